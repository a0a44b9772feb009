"""Undoes the side effects of a forward, so that tracing it changes nothing."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import random
import sys
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES = {"torch", "numpy", "builtins", "gankernels", *sys.stdlib_module_names} - {"__main__"}
_ATOMS = (str, bytes, int, float, complex, bool, type(None), Tensor, ModuleType, CodeType)
_NOTHING = object()
_SMALL = 1 << 20  # bytes of an array that is a counter or the like, not data


@contextlib.contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """Inside, ``root`` may run with placeholder arguments; afterwards its state is restored.

    The state is: all attributes of its modules; the contents of containers and objects that these,
    their classes and the functions they call hold or have as globals, closures and defaults;
    tensors that are written to; the random states of PyTorch, NumPy and Python; modes of autograd
    and warnings. Output, logs and warnings are suppressed.
    """
    undo = _Snapshot()
    undo.take(root)
    python, numpy = random.getstate(), np.random.get_state()
    devices = {t.device for t in root.parameters() if t.is_cuda}
    level = logging.root.manager.disable
    try:
        with (
            torch.random.fork_rng(list(devices)),
            torch.set_grad_enabled(torch.is_grad_enabled()),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _TensorsAsTheyWere(),
        ):
            warnings.simplefilter("ignore")
            logging.disable()
            yield
    finally:
        logging.disable(level)
        random.setstate(python)
        np.random.set_state(numpy)
        undo.restore()


class _TensorsAsTheyWere(TorchDispatchMode):
    """Restores existing tensors that are written to, and random generators that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = function._schema.arguments
        given = [*zip(schema, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
        for argument, value in given:
            if isinstance(value, torch.Generator):
                self.generators.setdefault(id(value), (value, value.get_state()))
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and id(tensor) not in self.before:
                        self.before[id(tensor)] = (tensor, tensor.detach().clone())
        return function(*args, **kwargs)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self.before.values()):
            if not tensor.is_meta and tensor.shape == value.shape:
                with torch.inference_mode(tensor.is_inference()):
                    tensor.detach().data.copy_(value)
        for generator, state in self.generators.values():
            generator.set_state(state)


class _Snapshot:
    """The contents of all mutable objects that can be reached from a module."""

    def __init__(self) -> None:
        self.seen: dict[int, object] = {}
        self.undo: list[Callable[[], object]] = []

    def restore(self) -> None:
        for undo in self.undo:
            undo()

    def take(self, root: object) -> None:
        pending = [root]
        while pending:
            thing = pending.pop()
            if isinstance(thing, _ATOMS) or id(thing) in self.seen:
                continue
            self.seen[id(thing)] = thing
            pending += self._keep(thing)

    def _keep(self, thing: object) -> list[object]:
        """Notes how to restore this one thing; returns what it refers to."""
        inside: list[object] = []
        if isinstance(thing, dict):
            kind = OrderedDict if isinstance(thing, OrderedDict) else dict
            inside += [*thing.keys(), *thing.values()]
            self._note(
                lambda: list(thing.items()),
                lambda old: (kind.clear(thing), kind.update(thing, old)),
            )
        elif isinstance(thing, (list, bytearray)):
            inside += thing if isinstance(thing, list) else ()
            self._note(lambda: list(thing), lambda old: thing.__setitem__(slice(None), old))
        elif isinstance(thing, (set, deque)):
            inside += thing
            add = thing.update if isinstance(thing, set) else thing.extend
            self._note(lambda: list(thing), lambda old: (thing.clear(), add(old)))
        elif isinstance(thing, (tuple, frozenset)):
            inside += thing
        elif isinstance(thing, np.ndarray):
            if thing.nbytes <= _SMALL and thing.flags.writeable:
                old = thing.copy()
                self.undo.append(lambda: thing.__setitem__(..., old))
        elif isinstance(thing, random.Random):
            self.undo.append(functools.partial(thing.setstate, thing.getstate()))
        elif isinstance(thing, (np.random.Generator, np.random.RandomState)):
            bits = getattr(thing, "bit_generator", None) or getattr(thing, "_bit_generator")  # noqa: B009
            self.undo.append(functools.partial(setattr, bits, "state", bits.state))
        elif isinstance(thing, torch.Generator):
            self.undo.append(functools.partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, types.MethodType):
            inside += [thing.__self__, thing.__func__]
        elif isinstance(thing, functools.partial):
            inside += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, functools._lru_cache_wrapper):
            if _is_users(thing):
                inside.append(thing.__wrapped__)
                size = thing.cache_info().currsize
                self.undo.append(lambda: _clear_unless(thing, size))
        elif isinstance(thing, FunctionType):
            inside += self._keep_function(thing) if _is_users(thing) else ()
        elif isinstance(thing, types.CellType):
            inside += self._keep_items(thing, ["cell_contents"])
        elif isinstance(thing, type):
            if _is_users(thing):
                inside += self._keep_class(thing)
        else:
            inside.append(type(thing))
            with contextlib.suppress(Exception):  # objects that generate attributes on access
                inside.append(vars(thing))
            slots = [vars(c).get("__slots__", ()) for c in type(thing).__mro__]
            names = [n for s in slots for n in ((s,) if isinstance(s, str) else s)]
            inside += self._keep_items(thing, names) if _is_users(type(thing)) else ()
        return inside

    def _note(self, read: Callable[[], list[Any]], write: Callable[[list[Any]], object]) -> None:
        old = read()

        def undo() -> None:
            if not _same(read(), old):
                write(old)

        self.undo.append(undo)

    def _keep_items(self, thing: object, names: list[str]) -> list[object]:
        """Attributes that are not in a dict."""
        kept = {}
        for name in names:
            with contextlib.suppress(AttributeError, ValueError):  # an empty slot, an empty cell
                kept[name] = getattr(thing, name)

        def undo() -> None:
            for name in names:
                with contextlib.suppress(AttributeError, ValueError, TypeError):
                    if name in kept:
                        object.__setattr__(thing, name, kept[name])
                    else:
                        object.__delattr__(thing, name)

        self.undo.append(undo)
        return list(kept.values())

    def _keep_class(self, cls: type) -> list[object]:
        before = dict(vars(cls))

        def undo() -> None:
            for name in [*before, *vars(cls)]:
                with contextlib.suppress(AttributeError, TypeError):  # Python's own entries
                    if name not in before:
                        delattr(cls, name)
                    elif vars(cls).get(name, _NOTHING) is not before[name]:
                        setattr(cls, name, before[name])

        self.undo.append(undo)
        properties = [p.fget for p in before.values() if isinstance(p, property)]
        methods = [getattr(m, "__func__", m) for m in before.values()]
        return [*cls.__mro__[1:], *properties, *methods]

    def _keep_function(self, function: FunctionType) -> list[object]:
        own, used = function.__globals__, names_in(function.__code__)
        before = {name: own[name] for name in used if name in own}

        def undo() -> None:
            for name in used:
                if name in before:
                    if own.get(name, _NOTHING) is not before[name]:
                        own[name] = before[name]
                elif not isinstance(own.get(name, np), ModuleType):  # imports may stay
                    del own[name]

        self.undo.append(undo)
        inside = [*before.values(), vars(function), *(function.__closure__ or ())]
        # Attributes of the user's own modules, as in `config.calls += 1`.
        for module in [m for m in before.values() if isinstance(m, ModuleType) and _is_users(m)]:
            held = {n: vars(module)[n] for n in used if n in vars(module)}
            self.undo.append(functools.partial(vars(module).update, held))
            inside += held.values()
        return [*inside, function.__defaults__, function.__kwdefaults__, inspect.unwrap(function)]


def _clear_unless(cached: functools._lru_cache_wrapper[Any], size: int) -> None:
    """Clear a cache unless it still has this size."""
    if cached.cache_info().currsize != size:
        cached.cache_clear()


def _same(now: list[Any], old: list[Any]) -> bool:
    """Whether they hold the same objects, pairs of which are compared one by one."""
    return len(now) == len(old) and all(
        a is b or (type(a) is type(b) is tuple and len(a) == 2 and a[0] is b[0] and a[1] is b[1])
        for a, b in zip(now, old, strict=True)
    )


def names_in(code: CodeType) -> set[str]:
    """All global names and attributes in a function and the functions inside of it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*inner)


def _is_users(thing: object) -> bool:
    """Whether it does not belong to PyTorch, NumPy or Python."""
    name = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    return isinstance(name, str) and name.partition(".")[0] not in _LIBRARIES
