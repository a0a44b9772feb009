"""Image files in one subfolder per class, decoded with Pillow."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Files handed to the threads at once, so that a folder of millions makes no millions of tasks.
_AHEAD = 1024
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B"})
_SUPPORTED_MODES = _GREY_MODES | {
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
}


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds, before any is decoded.

    The paths are an array of bytes, since a list of str would be copied into every process that
    reads it, as its reference counts change.
    """

    files: np.ndarray
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    channels: int


def scan(folder: Path, size: int | None, channels: int | None) -> Folder:
    """List the images; what ``size`` and ``channels`` leave open is read from their headers."""
    files, labels, classes = _list(folder)
    grey = True
    if size is None or channels is None:
        first = None
        for file, (mode, dimensions) in zip(files, _each(_read_header, files), strict=False):
            grey = grey and mode in _GREY_MODES
            if size is None:
                first = first or dimensions
                _check_size(file, dimensions, files[0], first)
            elif not grey:
                break
        size = size or first[0]
    return Folder(
        np.array([os.fsencode(file) for file in files]),
        torch.tensor(labels),
        classes,
        size,
        channels or (1 if grey else 3),
    )


def read(
    folder: Path, size: int | None, channels: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 ``(N, C, S, S)``, labels int64 ``(N,)`` and the names of the subfolders.

    Images that are not square are cut to their central square where ``size`` is given.
    Transparent pixels are shown on white, EXIF orientation is applied, of 16-bit grey the upper
    eight bits are kept, of an animation the first frame.
    """
    found = scan(folder, size, channels)
    shape = (found.channels, found.size, found.size)
    images = torch.empty(len(found.files), *shape, dtype=torch.uint8)
    decoded = _each(lambda file: decode(file, found.size, found.channels), found.files)
    for image, pixels in zip(images, decoded, strict=True):
        image.copy_(pixels)
    return images, found.labels, found.classes


def decode(file: bytes, size: int, channels: int) -> Tensor:
    """One image as uint8 ``(C, S, S)``."""
    pixels = _decode(os.fsdecode(file), size, channels)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``function`` of every item in order, computed by threads not far ahead of what is taken."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _AHEAD):
            yield from pool.map(function, items[start : start + _AHEAD])


def _list(folder: Path) -> tuple[list[str], list[int], tuple[str, ...]]:
    entries = _visible(folder)
    subfolders = [entry for entry in entries if entry.is_dir()]
    if not subfolders:
        if any(_is_image(entry) for entry in entries):
            raise ValueError(
                f"{folder}: images without labels; put the images of each class into a subfolder "
                "named after it (one subfolder will do)"
            )
        raise ValueError(
            f"{folder}: empty, neither subfolders of images nor train-images-idx3-ubyte[.gz] "
            "nor CIFAR-10's data_batch_1"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, subfolder in enumerate(subfolders):
        members = _visible(subfolder)
        nested = [entry.name for entry in members if entry.is_dir()]
        if nested:
            raise ValueError(
                f"{subfolder.path}: a class folder must hold images, this one holds the folder "
                f"{nested[0]!r}; if its folders are the classes, load {subfolder.path} instead"
            )
        images = [entry.path for entry in members if _is_image(entry)]
        if not images:
            raise ValueError(
                f"{subfolder.path}: a class folder without an image; accepted are "
                f"{' '.join(sorted(_SUFFIXES))}"
            )
        files += images
        labels += [label] * len(images)
    return files, labels, tuple(subfolder.name for subfolder in subfolders)


def _visible(folder: str | os.PathLike) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(".")),
            key=lambda entry: entry.name,
        )


def _is_image(entry: os.DirEntry) -> bool:
    return os.path.splitext(entry.name)[1].lower() in _SUFFIXES


def _check_size(
    file: str, dimensions: tuple[int, int], first_file: str, first: tuple[int, int]
) -> None:
    width, height = dimensions
    if dimensions != first:
        raise ValueError(
            f"{file}: is {height}x{width}, but {first_file} is {first[1]}x{first[0]}; "
            "give size= to resize all to one size"
        )
    if width != height:
        raise ValueError(
            f"{file}: is {height}x{width}, not square; give size= to cut and resize all"
        )


def _import_pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install gankernels[train]"
        ) from error
    return Image, ImageOps


@contextmanager
def _open(file: str):
    """Pillow's image of a file; whatever is wrong with the file is an error that names it."""
    Image, _ = _import_pillow()
    try:
        with Image.open(file) as image:
            if image.mode not in _SUPPORTED_MODES:
                raise ValueError(f"pixels of mode {image.mode!r} have no fixed range")
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{file}: not a readable image: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_header(file: str) -> tuple[str, tuple[int, int]]:
    with _open(file) as image:
        return image.mode, image.size


def _decode(file: str, size: int, channels: int) -> np.ndarray:
    Image, ImageOps = _import_pillow()
    with _open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque.convert("RGB")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            # Cut, then resize: as one call, the filter would reach beyond the square.
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(image)
