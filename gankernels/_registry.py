"""Classes by name: one per module of a package, and those that other packages add."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The subclasses of `base` that a package consists of, by name.

    Every module of the package whose name has no leading underscore defines one of them, which is
    called by the name of the module, with `-` for `_`: a new one is a new file, with no edit
    elsewhere. Other packages add classes of their own by `register`, or by an entry point of the
    group that is called like the package, such as `gankernels.games`.

    Args:
        package: the full name of the package.
        what: a word for one of the classes, for error messages.
        base: their base class.
    """

    def __init__(self, package: str, what: str, base: type[T]) -> None:
        self.package, self.what, self.base = package, what, base
        self._registered: dict[str, type[T]] = {}

    def names(self) -> list[str]:
        """The names of all, sorted; `get(name)` returns the class."""
        installed = (entry.name for entry in _installed(self.package))
        return sorted({*self._modules(), *self._registered, *installed})

    def get(self, name: str) -> type[T]:
        """The class of that name. Raises ValueError for an unknown one, with all known names."""
        if name in self._registered:
            return self._registered[name]
        if module := self._modules().get(name):
            return self._class_in(module)
        for entry in _installed(self.package).select(name=name):
            return self.register(name, entry.load())
        names = self.names()
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown {self.what} {name!r}{hint} Available: {', '.join(names)}")

    def register(self, name: str, cls: type[T]) -> type[T]:
        """Add a class. Raises TypeError unless it is a subclass of the base, ValueError for a name
        that is taken."""
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{name} must be a subclass of {self.base.__name__}, got {cls!r}")
        if name in self._modules() or self._registered.get(name, cls) is not cls:
            raise ValueError(f"name must be new, got {name!r}, which another {self.what} has")
        self._registered[name] = cls
        return cls

    def name_of(self, cls: type[T]) -> str:
        """The name under which a class was added, else the name of its module."""
        registered = {member: name for name, member in self._registered.items()}
        return registered.get(cls) or _spelled(cls.__module__.rpartition(".")[2])

    def _modules(self) -> dict[str, str]:
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return {_spelled(m.name): m.name for m in modules if not m.name.startswith("_")}

    def _class_in(self, name: str) -> type[T]:
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            member
            for member in vars(module).values()
            if isinstance(member, type)
            and issubclass(member, self.base)
            and member.__module__ == module.__name__
            and not member.__name__.startswith("_")
        ]
        if len(found) != 1:
            names = ", ".join(member.__name__ for member in found) or "none"
            raise TypeError(f"{module.__name__} must define one {self.base.__name__}, got {names}")
        return found[0]


@cache
def _installed(group: str) -> EntryPoints:
    return entry_points(group=group)


def _spelled(module: str) -> str:
    return module.replace("_", "-")
