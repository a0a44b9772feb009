"""The "python version" of CIFAR-10: pickled batches in a tar archive, or unpacked.

Pickle can run any code, so nothing a batch names is ever called: the few names that these files
use for a numpy array stand for inert records here, every other name is refused.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_META = "batches.meta"
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


def is_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in _BATCHES)


def read_folder(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Training images uint8 ``(N, 3, 32, 32)``, labels int64 ``(N,)``, class names."""
    paths = {name: folder / name for name in (_META, *_BATCHES)}
    return _assemble(
        folder,
        {
            name: _unpickle(f"{path}", path.read_bytes())
            for name, path in paths.items()
            if path.is_file()
        },
    )


def read_archive(archive: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The same from ``cifar-10-python.tar.gz``; nothing is written to disk."""
    parts = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in (_META, *_BATCHES):
                    parts[name] = _unpickle(
                        f"{archive}: {member.name}", tar.extractfile(member).read()
                    )
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged archive: {error}") from error
    return _assemble(archive, parts)


def _assemble(source: Path, parts: dict[str, dict]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    missing = [name for name in (_META, *_BATCHES) if name not in parts]
    if missing:
        raise ValueError(
            f"{source}: not CIFAR-10's python version, or incomplete: no {', '.join(missing)}"
        )
    classes = tuple(
        name.decode() if isinstance(name, bytes) else str(name)
        for name in _entry(f"{source}: {_META}", parts[_META], "label_names", list)
    )
    images, labels = [], []
    for name in _BATCHES:
        where = f"{source}: {name}"
        pixels = _entry(where, parts[name], "data", _Array).to_numpy(where)
        images.append(pixels.reshape(-1, 3, 32, 32))
        labels += _entry(where, parts[name], "labels", list)
        if sum(map(len, images)) != len(labels):
            raise ValueError(f"{where}: {len(pixels)} images, but another number of labels")
    if not all(type(label) is int and 0 <= label < len(classes) for label in labels):
        raise ValueError(f"{source}: a label outside the {len(classes)} classes of {_META}")
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels), classes


def _entry(where: str, part: dict, key: str, kind: type):
    # Python 2 wrote the files, so keys are bytes; copies rewritten by Python 3 have str.
    value = part.get(key.encode(), part.get(key))
    if not isinstance(value, kind):
        raise ValueError(f"{where}: damaged, no {key!r} entry of the expected kind")
    return value


class _Array:
    """What a pickled numpy array consists of."""

    def __init__(self, *_ignored) -> None:
        self.state = None

    def __setstate__(self, state) -> None:
        self.state = state

    def to_numpy(self, where: str) -> np.ndarray:
        try:
            _version, shape, dtype, fortran_order, raw = self.state
            if dtype.name not in (b"u1", "u1") or len(shape) != 2 or shape[1] != 3072:
                raise ValueError(f"expected (N, 3072) bytes, found {shape}")
            return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: damaged 'data' entry: {error}") from error


class _DType:
    def __init__(self, name, *_ignored) -> None:
        self.name = name

    def __setstate__(self, state) -> None:
        pass


_RECORDS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        try:
            return _RECORDS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no CIFAR-10 file does"
            ) from None


def _unpickle(where: str, content: bytes) -> dict:
    try:
        part = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything, MemoryError included
        raise ValueError(f"{where}: not a CIFAR-10 batch: {error}") from error
    if not isinstance(part, dict):
        raise ValueError(f"{where}: not a CIFAR-10 batch: holds a {type(part).__name__}")
    return part
