"""Fields: the kinds of values in the columns of a data set, and how networks see them.

A data set is a set of named columns; its :class:`Spec` says what each of them holds. Games are
built for a spec, draw batches of its columns, and make values of one of its fields.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gankernels._files import write_atomically
from gankernels._html import import_matplotlib
from gankernels.data._pictures import save_grid
from gankernels.data._pixels import to_float, to_uint8


class Field(ABC):
    """The kind of values in one column of a data set.

    A column is stored raw, as a tensor `(N, ...)` of `dtype`, and decoded for networks. Every field
    is a frozen dataclass of plain values, so that a checkpoint can hold it.
    """

    #: The dtype of the raw column.
    dtype: ClassVar[torch.dtype] = torch.float32
    #: The ending of the files that show samples.
    suffix: ClassVar[str] = ".npy"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one raw value."""

    @property
    def nbytes(self) -> int:
        """The size of one raw value."""
        return math.prod(self.shape) * self.dtype.itemsize

    def decode(self, raw: Tensor) -> Tensor:
        """Raw values as networks see them. Any number of leading dimensions."""
        return raw

    def encode(self, values: Tensor) -> Tensor:
        """A network's output as raw values: the inverse of `decode`. Not differentiable."""
        return values.detach().to(self.dtype)

    def random(self, n: int, rng: torch.Generator | None, device: torch.device) -> Tensor | None:
        """`n` random decoded values, or None if such values only come from data."""
        return None

    def save(self, raw: Tensor, path: Path, columns: int) -> None:
        """Write raw values `(N, ...)` to a file that shows them, `columns` of them side by side."""
        write_atomically(path, lambda file: np.save(file, raw.cpu().numpy()))

    def check(self, name: str, column: Tensor) -> None:
        """Raises TypeError or ValueError unless `column`, called `name`, holds raw values."""
        if not isinstance(column, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(column).__name__}")
        if column.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype}, got {column.dtype}")
        if column.shape[1:] != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise ValueError(f"{name} must have shape ({expected}), got {tuple(column.shape)}")


@dataclass(frozen=True)
class Image(Field):
    """Pixels: raw uint8 `(N, channels, height, width)`, decoded to [-1, 1] of a tanh generator."""

    dtype = torch.uint8
    suffix = ".png"

    channels: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _check_sizes(self, "channels", "height", "width")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def decode(self, raw: Tensor) -> Tensor:
        return to_float(raw)

    def encode(self, values: Tensor) -> Tensor:
        return to_uint8(values)

    def save(self, raw: Tensor, path: Path, columns: int) -> None:
        save_grid(raw, path, columns)


@dataclass(frozen=True)
class Label(Field):
    """A class: int64 `(N,)`, an index into the names of the classes."""

    dtype = torch.int64
    suffix = ".txt"

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_names(self, "classes")

    @property
    def shape(self) -> tuple[()]:
        return ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def random(self, n: int, rng: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.randint(self.num_classes, (n,), generator=rng, device=device)

    def save(self, raw: Tensor, path: Path, columns: int) -> None:
        _save_lines([self.classes[i] for i in raw.tolist()], path)

    def check(self, name: str, column: Tensor) -> None:
        super().check(name, column)
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < self.num_classes:
            raise ValueError(
                f"{name} must lie in 0..{self.num_classes - 1}, "
                f"got {int(column.min())}..{int(column.max())}"
            )


@dataclass(frozen=True)
class Tokens(Field):
    """A sequence: int64 `(N, length)` of indices into a vocabulary, whose entry 0 pads."""

    dtype = torch.int64
    suffix = ".txt"

    vocabulary: tuple[str, ...]
    length: int

    def __post_init__(self) -> None:
        _check_names(self, "vocabulary")
        _check_sizes(self, "length")

    @property
    def shape(self) -> tuple[int]:
        return (self.length,)

    def text(self, raw: Tensor) -> list[str]:
        """Sequences `(N, length)` as lines of text, without padding."""
        return [" ".join(self.vocabulary[i] for i in row if i) for row in raw.tolist()]

    def save(self, raw: Tensor, path: Path, columns: int) -> None:
        _save_lines(self.text(raw), path)


@dataclass(frozen=True)
class Vector(Field):
    """A vector, such as an embedding: float32 `(N, dim)`."""

    dim: int

    def __post_init__(self) -> None:
        _check_sizes(self, "dim")

    @property
    def shape(self) -> tuple[int]:
        return (self.dim,)


@dataclass(frozen=True)
class Point(Field):
    """A point in the plane: float32 `(N, 2)`."""

    suffix = ".png"

    @property
    def shape(self) -> tuple[int]:
        return (2,)

    def save(self, raw: Tensor, path: Path, columns: int) -> None:
        import_matplotlib()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4, 4))
        axes = figure.subplots()
        x, y = raw.cpu().T.numpy()
        axes.scatter(x, y, s=4)
        axes.set_aspect("equal", "datalim")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


KINDS: dict[str, type[Field]] = {
    cls.__name__.lower(): cls for cls in (Image, Label, Tokens, Vector, Point)
}


class Spec(dict[str, Field]):
    """The fields of a data set by the names of its columns.

    Sets of labeled images are the common case: their columns are called `images` and `labels`,
    and the properties below are shorthands for attributes of these fields.
    """

    @property
    def channels(self) -> int:
        return self._image.channels

    @property
    def size(self) -> int:
        """Height and width of the images in pixels. Raises ValueError if they differ."""
        _, height, width = self._image.shape
        if height != width:
            raise ValueError(f"images must be square, got {height}x{width}")
        return height

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._image.shape

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if the data have no labels."""
        field = self.get("labels")
        return field.classes if isinstance(field, Label) else ()

    @property
    def _image(self) -> Image:
        field = self.get("images")
        if not isinstance(field, Image):
            raise ValueError(f"the data must have a column of images, got {', '.join(self)}")
        return field

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values, for a checkpoint."""
        return {
            name: {"kind": type(field).__name__.lower(), **_plain(field)}
            for name, field in self.items()
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, Any]]) -> Spec:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        spec = cls()
        for name, values in content.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"{name} must be a mapping, got {type(values).__name__}")
            values = dict(values)
            kind = values.pop("kind", None)
            if not isinstance(kind, str) or kind not in KINDS:
                raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            try:
                spec[name] = KINDS[kind](**values)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        return spec


def image_spec(channels: int = 1, size: int = 28, num_classes: int = 10) -> Spec:
    """The spec of square images in classes that are called 0, 1, 2, ..."""
    classes = tuple(map(str, range(num_classes)))
    return Spec(images=Image(channels, size, size), labels=Label(classes))


def _check_sizes(field: Field, *names: str) -> None:
    for name in names:
        value = getattr(field, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_names(field: Field, name: str) -> None:
    value = getattr(field, name)
    if type(value) is not tuple or not value or not all(type(text) is str for text in value):
        raise ValueError(f"{name} must be a tuple of texts, got {value!r:.100}")


def _save_lines(lines: list[str], path: Path) -> None:
    write_atomically(path, lambda file: file.writelines(f"{x}\n".encode() for x in lines))


def _plain(field: Any) -> dict[str, Any]:
    values = {f.name: getattr(field, f.name) for f in fields(field)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
