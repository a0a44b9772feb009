"""The base class of the kinds of data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gankernels._registry import Registry
from gankernels.data._columns import Data
from gankernels.data._fields import Spec


@dataclass(frozen=True)
class DataOptions:
    """The settings of a kind of data that has none; subclasses add fields, each an `option`."""

    def settled(self, spec: Spec) -> DataOptions:
        """These options, with unset ones taken from the spec of the data."""
        return self

    def in_memory(self) -> DataOptions:
        """These options for data that are read into memory as a whole."""
        return self


class Kind(ABC):
    """A kind of data, such as a file format: how it is recognized and opened.

    A new kind is a new file in this folder that defines a subclass.
    """

    #: The settings of `open`, which `gankernels train --set` takes.
    Options: ClassVar[type[DataOptions]] = DataOptions
    #: The accepted sources, in words, for error messages.
    accepted: ClassVar[str]
    #: Data sets that have a name instead of a path.
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a file or folder is of this kind, by names of files: nothing is opened."""
        return False

    @classmethod
    def find(cls, folder: Path, training: bool = True) -> list[Path]:
        """The sources of this kind in a folder, or only those without training data.

        In a folder that no kind accepts, `load` searches for a single data set by this method.
        """
        return []

    @classmethod
    @abstractmethod
    def open(cls, source: str, options: Any, name: str) -> Data:
        """Open one of `names`, or a path that the kind accepts.

        Args:
            options: an instance of `Options`.
            name: the name of the data in logs and reports.

        Raises:
            ValueError: the source is damaged or does not fit the options. The file is named.
            ImportError: an optional library is missing.
        """


_registry: Registry[Kind] = Registry("gankernels.data", "kind of data", Kind)  # type: ignore[type-abstract]
kinds = _registry.names
"""The names of all kinds of data, sorted."""
get_kind = _registry.get
"""The kind class of a name. Raises ValueError for an unknown one, with the names that exist."""
register = _registry.register
"""Add a kind class under a name, for this process."""
kind_name = _registry.name_of
"""The name of a kind."""
