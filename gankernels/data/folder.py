"""Image files in one subfolder per class, decoded with Pillow."""

from __future__ import annotations

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
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


def read(
    folder: Path, size: int | None, channels: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 ``(N, C, S, S)``, labels int64 ``(N,)`` and the names of the subfolders.

    Images that are not square are cut to their central square where ``size`` is given.
    Transparent pixels are shown on white, EXIF orientation is applied, of 16-bit grey the upper
    eight bits are kept, of an animation the first frame.
    """
    files, labels, classes = _list(folder)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        # Headers first: they tell the shape of the result, and mistakes, before any is decoded.
        headers = list(pool.map(_read_header, files))
        if channels is None:
            channels = 1 if all(mode in _GREY_MODES for mode, _ in headers) else 3
        if size is None:
            size = _common_size(files, [dimensions for _, dimensions in headers])
        images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)

        def decode(index: int) -> None:
            pixels = _decode(files[index], size, channels)
            images[index] = torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)

        for _ in pool.map(decode, range(len(files))):
            pass
    return images, torch.tensor(labels), classes


def _list(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    entries = _visible(folder)
    subfolders = [entry for entry in entries if entry.is_dir()]
    if not subfolders:
        if any(entry.suffix.lower() in _SUFFIXES for entry in entries):
            raise ValueError(
                f"{folder}: images without labels; put the images of each class into a subfolder "
                "named after it (one subfolder will do)"
            )
        raise ValueError(
            f"{folder}: empty, neither subfolders of images nor train-images-idx3-ubyte[.gz] "
            "nor CIFAR-10's data_batch_1"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, subfolder in enumerate(subfolders):
        members = _visible(subfolder)
        nested = [entry.name for entry in members if entry.is_dir()]
        if nested:
            raise ValueError(
                f"{subfolder}: a class folder must hold images, this one holds the folder "
                f"{nested[0]!r}; if its folders are the classes, load {subfolder} instead"
            )
        images = [entry for entry in members if entry.suffix.lower() in _SUFFIXES]
        if not images:
            raise ValueError(
                f"{subfolder}: a class folder without an image; accepted are "
                f"{' '.join(sorted(_SUFFIXES))}"
            )
        files += images
        labels += [label] * len(images)
    return files, labels, tuple(subfolder.name for subfolder in subfolders)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _common_size(files: list[Path], dimensions: list[tuple[int, int]]) -> int:
    for file, (width, height) in zip(files, dimensions, strict=True):
        if (width, height) != dimensions[0]:
            raise ValueError(
                f"{file}: is {height}x{width}, but {files[0]} is "
                f"{dimensions[0][1]}x{dimensions[0][0]}; give size= to resize all to one size"
            )
        if width != height:
            raise ValueError(
                f"{file}: is {height}x{width}, not square; give size= to cut and resize all"
            )
    return dimensions[0][0]


def _import_pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install gankernels[train]"
        ) from error
    return Image, ImageOps


@contextmanager
def _open(file: Path):
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


def _read_header(file: Path) -> tuple[str, tuple[int, int]]:
    with _open(file) as image:
        return image.mode, image.size


def _decode(file: Path, size: int, channels: int) -> np.ndarray:
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
