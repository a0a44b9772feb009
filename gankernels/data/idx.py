"""The IDX format of the MNIST family: a big-endian header, then the bytes of an array."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gankernels.data._files import check_promise, either, open_unpacked, visible
from gankernels.data._images import ImageData, ImageOptions, image_data, numbered
from gankernels.data._kind import Kind

_IMAGES_FILE = re.compile(r"(.+)-images([-.])idx3-ubyte(\.gz)?")
# DEFLATE cannot expand by more than this factor, so a header that promises more is wrong.
_GZIP_MAX_RATIO = 1032
_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4"}
_IMAGES = ((8, 3),)
# QMNIST's labels are columns of numbers, the first of which is the class.
_LABELS = ((8, 1), (12, 2), *((kind, 1) for kind in (9, 11, 12)))
_QMNIST_COLUMNS = 8


class IDX(Kind):
    Options = ImageOptions
    accepted = "a folder with train-images-idx3-ubyte[.gz] and its labels, such an images file"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return bool(find(path)) if path.is_dir() else is_images_file(path)

    @classmethod
    def find(cls, folder: Path, training: bool = True) -> list[Path]:
        return find(folder, training)

    @classmethod
    def open(cls, source: str, options: ImageOptions, name: str) -> ImageData:
        path = Path(source)
        if path.is_dir():
            path, *more = find(path)
            if more:
                sets = either([path, *more])
                raise ValueError(f"{source}: several data sets; load {sets} instead")
        images, values = read(path)
        return image_data(images, *numbered(values), source, options, name)


def is_images_file(path: Path) -> bool:
    return _IMAGES_FILE.fullmatch(path.name) is not None


def find(folder: Path, training: bool = True) -> list[Path]:
    """The files with training images in ``folder``, or only those with other images."""
    files: dict[str, Path] = {}
    for entry in visible(folder):  # by name: unpacked ones before those in gzip
        match = _IMAGES_FILE.fullmatch(entry.name)
        if match and not entry.is_dir():
            stem = match[1]
            if (stem == "train" or stem.endswith("-train")) == training:
                files.setdefault(stem, Path(entry))
    return list(files.values())


def read(images_file: Path) -> tuple[Tensor, np.ndarray]:
    """Images uint8 ``(N, 1, H, W)`` and integer labels ``(N,)`` of a file and its labels file.

    EMNIST's files store images by columns instead of rows: they are transposed.
    """
    match = _IMAGES_FILE.fullmatch(images_file.name)
    assert match is not None  # is_images_file
    stem, separator, _ = match.groups()
    labels_file = _labels_file(images_file, stem, separator)
    images, labels = _read_array(images_file, _IMAGES), _read_array(labels_file, _LABELS)
    if labels.ndim == 2:
        if labels.shape[1] != _QMNIST_COLUMNS:
            raise ValueError(
                f"{labels_file}: labels must be (N,) or QMNIST's (N, 8), got {labels.shape}"
            )
        labels = labels[:, 0]
    if len(images) != len(labels):
        raise ValueError(f"{images_file}: {len(images)} images but {len(labels)} labels")
    if images.size == 0:
        raise ValueError(f"{images_file}: holds no images, its shape is {images.shape}")
    if stem.startswith("emnist-"):
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    return torch.from_numpy(images).unsqueeze(1), labels.astype(np.int64)


def _labels_file(images_file: Path, stem: str, separator: str) -> Path:
    usual = f"{stem}-labels{separator}idx1-ubyte"
    kinds = ("idx1-ubyte", "idx2-int", "idx1-int")
    separators = (separator, *{"-", "."} - {separator})
    for name in (usual, *(f"{stem}-labels{s}{kind}" for s in separators for kind in kinds)):
        for path in (images_file.with_name(name), images_file.with_name(f"{name}.gz")):
            if os.path.lexists(path) and not path.is_dir():
                return path
    raise ValueError(f"{images_file}: no labels, {usual}[.gz] is not in its folder")


def _read_array(path: Path, accepted: tuple[tuple[int, int], ...]) -> np.ndarray:
    try:
        with open_unpacked(path) as (stream, stored):
            start = stream.read(4)
            kind, dims = accepted[0]
            if start[:2] == b"\0\0" and tuple(start[2:]) in accepted:
                kind, dims = start[2:]
            sizes = stream.read(4 * dims)
            if len(sizes) < 4 * dims:
                raise ValueError("it ends inside the header")
            if start != bytes([0, 0, kind, dims]):
                raise ValueError(
                    f"starts with {start.hex(' ')}, expected 00 00 {kind:02x} {dims:02x} "
                    f"(unsigned bytes, {dims} dimension{'s' * (dims > 1)})"
                )
            shape = struct.unpack(f">{dims}I", sizes)
            dtype = np.dtype(_TYPES[kind])
            expected = math.prod(shape) * dtype.itemsize
            expands = _GZIP_MAX_RATIO if isinstance(stream, gzip.GzipFile) else 1
            if expected > stored * expands:
                raise ValueError(f"truncated, the header promises {expected} bytes of data")
            check_promise(expected, stored)
            return _read_exactly(stream, expected).view(dtype).reshape(shape)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged IDX file: {error}") from error


def _read_exactly(stream: BinaryIO, expected: int) -> np.ndarray:
    """The whole stream, read directly into an array that it must fill exactly."""
    data = np.empty(expected, np.uint8)
    filled = 0
    while chunk := stream.read(1 << 20):
        if filled + len(chunk) > expected:
            raise ValueError(f"longer than the {expected} bytes that its header promises")
        data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if filled < expected:
        raise ValueError(f"truncated, {filled} bytes of data where the header promises {expected}")
    return data
