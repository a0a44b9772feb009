"""Image files in one subfolder per class, decoded with Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gankernels.data.files import check_memory, suffixes, visible
from gankernels.data.pillow import SUFFIXES, import_pillow, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

# Files handed to the threads at once, so that a folder of millions makes no millions of tasks.
_AHEAD = 1024
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"})
# Of 32 bits or floating point nobody can say which values are black and white.
_NO_RANGE = frozenset({"I", "F"})
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
_ACCEPTED = " ".join(sorted(SUFFIXES))
# Levels down to which folders are searched for those that hold the classes.
_DEPTH = 4


class NoClassesError(ValueError):
    """A folder does not hold one subfolder of images per class."""


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
    """List the images; what ``size`` and ``channels`` leave open is read from their headers.

    Raises:
        NoClassesError: the folder is no folder of classes.
        ValueError: an image is damaged, or is not as large as the others. It is named.
    """
    files, labels, classes = _list(folder)
    grey = True
    if size is None or channels is None:
        first = None
        for file, (is_grey, dimensions) in zip(files, _each(_read_header, files), strict=False):
            grey = grey and is_grey
            if size is None:
                first = first or dimensions
                _check_size(file, dimensions, files[0], first)
            elif not grey:
                break
        size = size or first[0]
    channels = channels or (1 if grey else 3)
    _check_fits(folder, 1, channels, size)
    return Folder(
        np.array([os.fsencode(file) for file in files]),
        torch.tensor(labels),
        classes,
        size,
        channels,
    )


def read(
    folder: Path, size: int | None, channels: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 ``(N, C, S, S)``, labels int64 ``(N,)`` and the names of the subfolders.

    Images that are not square are cut to their central square where ``size`` is given.
    Transparent pixels are shown on white, EXIF orientation is applied, of deeper grey the upper
    eight bits are kept, of an animation the first frame.
    """
    found = scan(folder, size, channels)
    _check_fits(folder, len(found.files), found.channels, found.size)
    images = torch.empty(
        len(found.files), found.channels, found.size, found.size, dtype=torch.uint8
    )
    decoded = _each(lambda file: decode(file, found.size, found.channels), found.files)
    for image, pixels in zip(images, decoded, strict=True):
        image.copy_(pixels)
    return images, found.labels, found.classes


def _check_fits(folder: Path, count: int, channels: int, size: int) -> None:
    try:
        check_memory(count * channels * size**2)
    except ValueError as error:
        advice = "stream=True reads them as they are drawn" if count > 1 else "size= is too large"
        raise ValueError(f"{folder}: {count} of {size}x{size} {error}; {advice}") from error


def decode(file: bytes, size: int, channels: int) -> Tensor:
    """One image as uint8 ``(C, S, S)``."""
    pixels = _decode(os.fsdecode(file), size, channels)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``function`` of every item in order, computed by threads not far ahead of what is taken."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _AHEAD):
            yield from pool.map(function, items[start : start + _AHEAD])


def has_classes(folder: Path) -> bool:
    """Whether a subfolder holds images."""
    subfolders = (entry for entry in visible(folder) if entry.is_dir())
    return any(_is_image(entry) for subfolder in subfolders for entry in visible(subfolder))


def search(folder: str | os.PathLike, depth: int = _DEPTH) -> Iterator[Path]:
    """The folders of classes further down, which can be loaded instead."""
    for entry in visible(folder) if depth else ():
        if entry.is_dir() and not any(map(_is_image, visible(entry.path))):
            try:
                _list(entry.path)
                yield Path(entry)
            except NoClassesError:
                yield from search(entry.path, depth - 1)


def _list(folder: str | os.PathLike) -> tuple[list[str], list[int], tuple[str, ...]]:
    entries = visible(folder)
    subfolders = [entry for entry in entries if entry.is_dir()]
    if not subfolders:
        if any(map(_is_image, entries)):
            raise NoClassesError(
                f"{folder}: images without labels; put the images of each class into a subfolder "
                "named after it (one subfolder will do)"
            )
        holds = f"holds {_kinds(entries)}" if entries else "empty"
        raise NoClassesError(
            f"{folder}: {holds}, neither subfolders of images nor train-images-idx3-ubyte[.gz] "
            "nor CIFAR's python batches nor an .npz; a packed set is unpacked first; images are "
            f"{_ACCEPTED}"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, subfolder in enumerate(subfolders):
        members = visible(subfolder)
        images = [entry.path for entry in members if _is_image(entry)]
        nested = [entry.name for entry in members if entry.is_dir()]
        if nested:
            stray = f"{nested[0]} out of there" if images else f"it out of {folder}"
            raise NoClassesError(
                f"{subfolder.path}: a class folder must hold images, this one holds the folder "
                f"{nested[0]!r}; if it is no class, take {stray}"
            )
        if not images:
            raise NoClassesError(
                f"{subfolder.path}: a class folder without an image"
                f"{f', it holds {_kinds(members)}' if members else ''}; accepted are {_ACCEPTED}; "
                f"if it is no class, take it out of {folder}"
            )
        files += images
        labels += [label] * len(images)
    return files, labels, tuple(subfolder.name for subfolder in subfolders)


def _is_image(entry: os.DirEntry) -> bool:
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.is_dir()


def _kinds(entries: Sequence[os.DirEntry]) -> str:
    return suffixes(entry.name for entry in entries)


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


def _read_header(file: str) -> tuple[bool, tuple[int, int]]:
    """Whether an image is grey, and its width and height."""
    with open_image(file) as image:
        _deep_bits(image)
        # Pillow makes RGBA of a PNG's 16-bit grey with alpha.
        stored = image.tile[0].args if image.tile else None
        return image.mode in _GREY_MODES or "LA;16B" in (stored, *(stored or ())), image.size


def _deep_bits(image: Image) -> int:
    """Bits of a grey that has more than eight of them, otherwise 0."""
    if image.mode.startswith("I;16"):
        return getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 16
    if image.mode in _NO_RANGE:
        raise ValueError(
            f"pixels of mode {image.mode!r} have no fixed range; save them with 8 or 16 bits"
        )
    return 0


def _upper_bits(image: Image, bits: int, inverted: bool) -> np.ndarray:
    deep = np.asarray(image)
    pixels = (deep >> (bits - 8)).astype(np.uint8)
    if inverted:
        pixels = ~pixels
    if isinstance(transparent := image.info.get("transparency"), int):
        pixels[deep == transparent] = 255
    return pixels


def _decode(file: str, size: int, channels: int) -> np.ndarray:
    Image, ImageOps = import_pillow()
    with open_image(file) as image:
        bits = _deep_bits(image)
        inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        image = ImageOps.exif_transpose(image)
        if bits:
            image = Image.fromarray(_upper_bits(image, bits, inverted))
        if image.mode in ("La", "RGBa"):  # colours times alpha, which nothing else converts from
            image = image.convert(image.mode.upper())
        if "A" in image.getbands() or "transparency" in image.info:
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
