"""Data sets as named columns.

A `Table` is a set of columns of one length, whose rows belong together, such as images and their
labels. A `Data` is one or more tables: a batch has the same number of rows of each, drawn
independently. Unpaired data, such as photographs and paintings, are therefore two tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from gankernels.data._fields import Field, Spec


class Data(Protocol):
    """The data that a game is trained on: one or more tables."""

    @property
    def name(self) -> str:
        """The name of the data in logs and reports."""

    @property
    def spec(self) -> Spec:
        """The fields of all columns."""

    @property
    def tables(self) -> Sequence[Table]:
        """The parts that a batch draws from independently of one another."""

    def identity(self) -> str:
        """A digest of the content, by which a checkpoint recognizes the data under any path."""


class Table(Data, Protocol):
    """Data whose columns are of one length."""

    def __len__(self) -> int: ...

    @property
    def columns(self) -> Mapping[str, Tensor] | None:
        """The raw columns if they are in memory, else None."""

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """The raw columns of `rows`, int64 `(n,)`. Raises ValueError if one cannot be read."""


class Columns:
    """A table in memory.

    Args:
        spec: the field of every column.
        columns: raw columns by name, tensors `(N, ...)` with the same N >= 1.
        name: the name of the data in logs and reports.

    Raises:
        TypeError, ValueError: columns that are not those of the spec, or of different lengths.
    """

    def __init__(self, spec: Mapping[str, Field], columns: Mapping[str, Tensor], name: str) -> None:
        self.spec, self.columns, self.name = Spec(spec), dict(columns), name
        if self.spec.keys() != self.columns.keys():
            raise ValueError(
                f"columns must be those of the spec, {', '.join(self.spec)}, "
                f"got {', '.join(self.columns)}"
            )
        for column, field in self.spec.items():
            field.check(column, self.columns[column])
        lengths = {column: len(tensor) for column, tensor in self.columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"columns must be of one length of at least 1, got {lengths}")

    @property
    def tables(self) -> tuple[Columns]:
        return (self,)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __repr__(self) -> str:
        return f"Columns({self.name!r}: {len(self)} rows of {', '.join(self.columns)})"

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self.columns.items()}

    def identity(self) -> str:
        result = hashlib.sha256()
        for name, column in self.columns.items():
            result.update(repr((name, tuple(column.shape))).encode())
            result.update(column.contiguous().cpu().numpy().data)
        return result.hexdigest()


class Unpaired:
    """Tables that a batch draws from independently; their columns have different names."""

    def __init__(self, tables: Sequence[Table], name: str) -> None:
        self.tables, self.name = tuple(tables), name
        self.spec = Spec()
        for table in self.tables:
            if shared := self.spec.keys() & table.spec.keys():
                raise ValueError(f"tables must have different columns, got {sorted(shared)} twice")
            self.spec.update(table.spec)

    def __repr__(self) -> str:
        return f"Unpaired({self.name!r}: {', '.join(map(repr, self.tables))})"

    def identity(self) -> str:
        return hashlib.sha256("".join(t.identity() for t in self.tables).encode()).hexdigest()
