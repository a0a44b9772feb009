"""The "python version" of CIFAR-10 and CIFAR-100: pickled batches in a tar archive, or unpacked.

Pickle can run any code, so nothing that a batch names is ever called: the few names that these
files use for a numpy array become inert records here, every other name is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from gankernels.data._files import one_line, open_regular, open_unpacked
from gankernels.data._images import ImageData, ImageOptions, image_data
from gankernels.data._kind import Kind

# Unpacked, either set takes 186 MB, and no file takes more than 400,000 steps to unpickle.
_MAX_BYTES = 1 << 28
_MAX_STEPS = 2_000_000


class _Set(NamedTuple):
    """The names of the files and entries of a set."""

    title: str
    folder: str
    archive: str
    meta: str
    class_names: str
    batches: tuple[str, ...]
    labels: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.meta, *self.batches)


_SETS = (
    _Set(
        "CIFAR-10",
        "cifar-10-batches-py",
        "cifar-10-python",
        "batches.meta",
        "label_names",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "labels",
    ),
    _Set(
        "CIFAR-100",
        "cifar-100-python",
        "cifar-100-python",
        "meta",
        "fine_label_names",
        ("train",),
        "fine_labels",
    ),
)
_SET_OF = {name: each for each in _SETS for name in each.files}
_ADVICE = "the only archives that are read: unpack it"
_ARCHIVES = (".tar.gz", ".tgz", ".tar")


class CIFAR(Kind):
    Options = ImageOptions
    accepted = "the python archive (.tar.gz) of CIFAR-10 or CIFAR-100 or its folder"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_folder(path) if path.is_dir() else is_archive(path.name)

    @classmethod
    def find(cls, folder: Path, training: bool = True) -> list[Path]:
        return find(folder) if training else []

    @classmethod
    def open(cls, source: str, options: ImageOptions, name: str) -> ImageData:
        path = Path(source)
        read = read_folder if path.is_dir() else read_archive
        return image_data(*read(path), source, options, name)


def is_archive(name: str) -> bool:
    return name.lower().endswith(_ARCHIVES)


def is_folder(path: Path) -> bool:
    return _folder_set(path) is not None


def find(folder: Path) -> list[Path]:
    """``folder`` itself, or the archives in it that are not unpacked in the same folder."""
    if is_folder(folder):
        return [folder]
    archives = [_archive(folder, each) for each in _SETS if not is_folder(folder / each.folder)]
    return [archive for archive in archives if archive]


def read_folder(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Training images uint8 ``(N, 3, 32, 32)``, labels int64 ``(N,)``, class names."""
    kind = _folder_set(folder)
    assert kind is not None  # is_folder
    try:
        parts = {}
        for name in kind.files:
            if os.path.lexists(folder / name):
                parts[name] = _unpickle(f"{folder / name}", name, _read_file(folder / name))
        return _assemble(folder, kind, parts)
    except ValueError as error:
        if archive := _archive(folder.parent, kind):
            raise ValueError(f"{error}; load {archive} instead, or unpack it again") from error
        raise


def read_archive(archive: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The same from ``cifar-10-python.tar.gz``; nothing is written to disk."""
    parts = {}
    try:
        with open_unpacked(archive) as (stream, _):
            bounded = _Bounded(stream)
            with tarfile.open(fileobj=cast(BinaryIO, bounded), mode="r:") as tar:
                for member in tar:
                    bounded.check(member.size)  # a sparse member is small in the archive
                    name = Path(member.name).name
                    if member.isfile() and name in _SET_OF:
                        file = tar.extractfile(member)
                        assert file is not None  # isfile
                        parts[name] = _unpickle(f"{archive}: {member.name}", name, file.read())
            # gzip's checksum follows its content.
            while bounded.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        if str(error).startswith(f"{archive}: "):
            raise
        raise ValueError(f"{archive}: damaged archive: {one_line(error)}") from error
    if not parts:
        raise ValueError(f"{archive}: no batches of CIFAR in it, {_ADVICE}")
    kind = next((each for each in _SETS if each.meta in parts), _SETS[0])
    return _assemble(archive, kind, parts)


class _Bounded:
    """A stream from which no more bytes can be read, at once or in total, than CIFAR has.

    Checking members is not enough: tarfile also reads as many bytes of a name as a header claims.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        self.check(self.tell() + size)
        return self.stream.read(size)

    def seek(self, position: int) -> int:
        self.check(position)
        return self.stream.seek(position)

    def check(self, position: int) -> None:
        if position > _MAX_BYTES:
            raise ValueError(f"{position:,} bytes are more than CIFAR's, {_ADVICE}")


def _folder_set(folder: Path) -> _Set | None:
    def holds(name: str) -> bool:
        return os.path.lexists(folder / name) and not (folder / name).is_dir()

    ten, hundred = _SETS
    if any(map(holds, ten.batches)):
        return ten
    return hundred if all(map(holds, hundred.files)) else None


def _archive(folder: Path, kind: _Set) -> Path | None:
    paths = (folder / f"{kind.archive}{suffix}" for suffix in _ARCHIVES)
    return next((path for path in paths if path.is_file()), None)


def _read_file(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise ValueError(f"{size:,} bytes are more than CIFAR's")
            return file.read()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _assemble(
    source: Path, kind: _Set, parts: dict[str, dict[Any, Any]]
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    missing = [name for name in kind.files if name not in parts]
    if missing:
        raise ValueError(
            f"{source}: not {kind.title}'s python version, or incomplete: no {', '.join(missing)}"
        )
    names = _entry(f"{source}: {kind.meta}", parts[kind.meta], kind.class_names, list)
    if not all(isinstance(name, (bytes, str)) for name in names):
        raise ValueError(f"{source}: {kind.meta}: damaged, a class without a name")
    classes = tuple(
        name.decode(errors="replace") if isinstance(name, bytes) else name for name in names
    )
    images, labels = [], []
    for name in kind.batches:
        where = f"{source}: {name}"
        pixels = _entry(where, parts[name], "data", _Array).to_numpy(where)
        images.append(pixels.reshape(-1, 3, 32, 32))
        theirs = _entry(where, parts[name], kind.labels, list)
        if len(theirs) != len(pixels):
            raise ValueError(f"{where}: {len(pixels)} images, but another number of labels")
        if not all(type(label) is int and 0 <= label < len(classes) for label in theirs):
            raise ValueError(f"{where}: a label outside the {len(classes)} classes of {kind.meta}")
        labels += theirs
    if not labels:
        raise ValueError(f"{source}: holds no images")
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels), classes


def _entry(where: str, part: dict[Any, Any], key: str, kind: type) -> Any:
    # Python 2 wrote the files, so keys are bytes; copies rewritten by Python 3 have str.
    value = part.get(key.encode(), part.get(key))
    if not isinstance(value, kind):
        raise ValueError(f"{where}: damaged, no {key!r} entry of the expected kind")
    return value


class _Array:
    """The parts of a pickled numpy array."""

    def __init__(self, *_ignored: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self, where: str) -> np.ndarray:
        try:
            _version, shape, dtype, fortran_order, raw = self.state
            if dtype.name not in (b"u1", "u1") or len(shape) != 2 or shape[1] != 3072:
                raise ValueError(f"expected (N, 3072) bytes, found {shape}")
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")
        except Exception as error:  # a damaged entry can be anything
            raise ValueError(f"{where}: damaged 'data' entry: {one_line(error)}") from error


class _DType:
    def __init__(self, name: object, *_ignored: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


_RECORDS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _RECORDS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no file of CIFAR does"
            ) from None


def _unpickle(where: str, name: str, content: bytes) -> dict[Any, Any]:
    what = f"not a {_SET_OF[name].title} batch"
    try:
        # Pickle allocates a table as long as the largest index in it.
        for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if step > _MAX_STEPS:
                raise ValueError("it takes too many steps to unpickle")
            if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(content):
                raise ValueError(f"it names place {argument:,} of its memory")
        part = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything, MemoryError included
        raise ValueError(f"{where}: {what}: {one_line(error)}") from error
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {what}: holds a {type(part).__name__}")
    return part
