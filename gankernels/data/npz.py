"""numpy's .npz with two arrays, ``images`` and ``labels``."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from gankernels.data._files import check_promise, one_line, open_regular, visible
from gankernels.data._images import ImageData, ImageOptions, image_data, numbered
from gankernels.data._kind import Kind

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MAX_HEADER = 1 << 16


class _Array(NamedTuple):
    """The header of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype


class NPZ(Kind):
    Options = ImageOptions
    accepted = "an .npz with images and labels"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path.name) and not path.is_dir()

    @classmethod
    def find(cls, folder: Path, training: bool = True) -> list[Path]:
        return find(folder) if training else []

    @classmethod
    def open(cls, source: str, options: ImageOptions, name: str) -> ImageData:
        images, values = read(Path(source))
        return image_data(images, *numbered(values), source, options, name)


def find(folder: Path) -> list[Path]:
    return [Path(entry) for entry in visible(folder) if is_file(entry.name) and not entry.is_dir()]


def is_file(name: str) -> bool:
    return name.lower().endswith(".npz")


def read(path: Path) -> tuple[Tensor, np.ndarray]:
    """Images uint8 ``(N, C, H, W)`` and labels ``(N,)``, integers or strings."""
    with _open(path) as archive:
        headers = {
            name: _read_header(archive, f"{name}.npy")
            for name in ("images", "labels")
            if f"{name}.npy" in archive.namelist()
        }
        names = [name.removesuffix(".npy") for name in archive.namelist()[:20]]
    # Everything that headers can tell is checked before any large read.
    for name in ("images", "labels"):
        if name not in headers:
            raise ValueError(f"{path}: no array {name!r} among {names}")
    images, labels = headers["images"], headers["labels"]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images must be uint8 in 0..255, got {images.dtype}")
    if labels.dtype.kind not in "iuU":
        raise ValueError(f"{path}: labels must be integers or strings, got {labels.dtype}")
    axes = _channels_first(path, images.shape)
    if math.prod(labels.shape) != images.shape[0]:
        raise ValueError(
            f"{path}: labels must be one per image, ({images.shape[0]},), got {labels.shape}"
        )
    with _open(path) as archive:
        pixels, values = (_read_array(archive, f"{name}.npy") for name in ("images", "labels"))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(axes)
    return torch.from_numpy(np.ascontiguousarray(pixels)), values.reshape(-1)


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_regular(path) as file:
            # Checked first: for an empty file or a pickle, zipfile's own error says less.
            if not zipfile.is_zipfile(file):
                raise ValueError("not a zip archive")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(
            f"{path}: not a readable .npz of plain arrays: {one_line(error)}"
        ) from error


def _read_header(archive: zipfile.ZipFile, name: str) -> _Array:
    entry = archive.getinfo(name)
    with archive.open(entry) as member:
        # Not from the member itself, which would be read up to the header length that it claims.
        file = io.BytesIO(member.read(_MAX_HEADER))
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{name} is of version {version} of numpy's format")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise ValueError(f"Objects in {name} are not read, since they can run code")
        promised = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or file.tell() + promised != entry.file_size:
            raise ValueError(f"{name} promises {promised:,} bytes, but has {entry.file_size:,}")
    assert archive.fp is not None  # it is open
    archive_size = os.fstat(archive.fp.fileno()).st_size
    check_promise(promised, min(entry.compress_size, archive_size))
    return _Array(shape, dtype)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    _read_header(archive, name)  # again, since the file may have been replaced
    with archive.open(name) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # zipfile compares the checksum at the end
    return array


def _channels_first(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation of four axes to ``(N, C, H, W)``."""
    if 0 in shape:
        raise ValueError(f"{path}: images are empty, their shape is {shape}")
    if len(shape) == 3 or (len(shape) == 4 and shape[1] in (1, 3)):
        return (0, 1, 2, 3)
    if len(shape) == 4 and shape[3] in (1, 3):
        return (0, 3, 1, 2)
    raise ValueError(
        f"{path}: images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, got {shape}"
    )
