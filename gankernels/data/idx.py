"""The IDX format of the MNIST family: a big-endian header, then the bytes of an array."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_IMAGES_FILE = re.compile(r"(.+)-images([-.])idx3-ubyte(\.gz)?")
# DEFLATE cannot expand by more than this, so a header that promises more is wrong, and is found
# out before memory is asked for.
_GZIP_MAX_RATIO = 1032


def is_images_file(path: Path) -> bool:
    return _IMAGES_FILE.fullmatch(path.name) is not None


def find(folder: Path) -> Path | None:
    """The file with the training images in ``folder``, if it is an IDX folder."""
    for name in ("train-images-idx3-ubyte", "train-images.idx3-ubyte"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read(images_file: Path) -> tuple[Tensor, np.ndarray]:
    """Images ``(N, 1, H, W)`` and labels ``(N,)``, both uint8, of a file and its labels file."""
    stem, separator, _ = _IMAGES_FILE.fullmatch(images_file.name).groups()
    labels_name = f"{stem}-labels{separator}idx1-ubyte"
    candidates = [images_file.with_name(name) for name in (labels_name, f"{labels_name}.gz")]
    labels_file = next((path for path in candidates if path.is_file()), None)
    if labels_file is None:
        raise ValueError(f"{images_file}: no labels, {labels_name}[.gz] is not beside it")
    images, labels = _read_array(images_file, dims=3), _read_array(labels_file, dims=1)
    if len(images) != len(labels):
        raise ValueError(f"{images_file}: {len(images)} images but {len(labels)} labels")
    if images.size == 0:
        raise ValueError(f"{images_file}: holds no images, its shape is {images.shape}")
    return torch.from_numpy(images).unsqueeze(1), labels


def _read_array(path: Path, dims: int) -> np.ndarray:
    # By content, not by name: downloads often arrive unpacked under a name that ends in .gz.
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as stream:
            header = stream.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims:
                raise ValueError("it ends inside the header")
            if header[:4] != bytes([0, 0, 8, dims]):
                raise ValueError(
                    f"starts with {header[:4].hex(' ')}, expected 00 00 08 {dims:02x} "
                    f"(unsigned bytes, {dims} dimension{'s' * (dims > 1)})"
                )
            shape = struct.unpack(f">{dims}I", header[4:])
            expected = math.prod(shape)
            limit = path.stat().st_size * (_GZIP_MAX_RATIO if compressed else 1)
            if expected > limit:
                raise ValueError(f"truncated, the header promises {expected} bytes of data")
            return _read_exactly(stream, expected).reshape(shape)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged IDX file: {error}") from error


def _read_exactly(stream, expected: int) -> np.ndarray:
    """All of the stream, straight into its final place, which it must fill exactly."""
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
