"""Image files in one subfolder per class, decoded with Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gankernels.data._decode import decode, each, read_header
from gankernels.data._files import check_memory, either, suffixes, visible
from gankernels.data._image_files import ImageFiles
from gankernels.data._images import ImageData, ImageOptions, image_data
from gankernels.data._kind import Kind
from gankernels.data._pillow import SUFFIXES
from gankernels.data._search import search as search_packed

_ACCEPTED = " ".join(sorted(SUFFIXES))
# Levels down to which folders are searched for folders of classes.
_DEPTH = 4


class NoClassesError(ValueError):
    """A folder does not hold one subfolder of images per class."""


class Folder(Kind):
    Options = ImageOptions
    accepted = "a folder with one subfolder of images per class"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return path.is_dir() and has_classes(path)

    @classmethod
    def open(cls, source: str, options: ImageOptions, name: str) -> ImageData | ImageFiles:
        try:
            files = scan(Path(source), options, name)
        except NoClassesError as error:
            raise _with_advice(error, Path(source)) from None
        return files if options.stream else read(Path(source), files)


def _with_advice(error: NoClassesError, path: Path) -> ValueError:
    """The error, and what to load instead if there is something further down."""
    images = sorted(search(path), key=lambda each: not each.name.startswith("train"))
    if found := [place for _, place in search_packed(path)] + images:
        return ValueError(f"{error}; for what lies deeper load {either(found)} instead")
    if tests := [place for _, place in search_packed(path, training=False)]:
        return ValueError(f"{path}: no training images; load {either(tests)} instead")
    return error


def scan(folder: Path, options: ImageOptions, name: str) -> ImageFiles:
    """List the images; a size and channels that are not in the options are read from the headers.

    Raises:
        NoClassesError: the folder is not a folder of classes.
        ValueError: an image is damaged, or is not as large as the others. It is named.
    """
    files, labels, classes = _list(folder)
    size, channels = options.size, options.channels
    gray = True
    if size is None or channels is None:
        first = None
        for file, (is_gray, dimensions) in zip(files, each(read_header, files), strict=False):
            gray = gray and is_gray
            if size is None:
                first = first or dimensions
                _check_size(file, dimensions, files[0], first)
            elif not gray:
                break
        if first is not None:
            size = first[0]
    assert size is not None  # of the first file
    channels = channels or (1 if gray else 3)
    _check_fits(folder, 1, channels, size)
    encoded = np.array([os.fsencode(file) for file in files])
    return ImageFiles(encoded, torch.tensor(labels), classes, size, channels, name)


def read(folder: Path, files: ImageFiles) -> ImageData:
    """All images in memory.

    Images that are not square are cut to their central square if a size is given. Transparent
    pixels are shown on white, EXIF orientation is applied, and only the upper eight bits of deeper
    gray and the first frame of an animation are kept.
    """
    size, channels = files.size, files.channels
    _check_fits(folder, len(files), channels, size)
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    decoded = each(lambda file: decode(file, size, channels), list(files.files))
    for image, pixels in zip(images, decoded, strict=True):
        image.copy_(pixels)
    options = ImageOptions(size, channels)
    return image_data(images, files.labels, files.classes, str(folder), options, files.name)


def _check_fits(folder: Path, count: int, channels: int, size: int) -> None:
    try:
        check_memory(count * channels * size**2)
    except ValueError as error:
        advice = "stream=True reads them as they are drawn" if count > 1 else "size= is too large"
        raise ValueError(f"{folder}: {count} of {size}x{size} {error}; {advice}") from error


def has_classes(folder: Path) -> bool:
    """Whether a subfolder holds images."""
    subfolders = (entry for entry in visible(folder) if entry.is_dir())
    return any(_is_image(entry) for subfolder in subfolders for entry in visible(subfolder))


def search(folder: str | os.PathLike[str], depth: int = _DEPTH) -> Iterator[Path]:
    """The folders of classes further down, which can be loaded instead."""
    for entry in visible(folder) if depth else ():
        if entry.is_dir() and not any(map(_is_image, visible(entry.path))):
            try:
                _list(entry.path)
                yield Path(entry)
            except NoClassesError:
                yield from search(entry.path, depth - 1)


def _list(folder: str | os.PathLike[str]) -> tuple[list[str], list[int], tuple[str, ...]]:
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
                f"{nested[0]!r}; if it is not a class, take {stray}"
            )
        if not images:
            raise NoClassesError(
                f"{subfolder.path}: a class folder without an image"
                f"{f', it holds {_kinds(members)}' if members else ''}; images are {_ACCEPTED}; "
                f"if it is not a class, take it out of {folder}"
            )
        files += images
        labels += [label] * len(images)
    return files, labels, tuple(subfolder.name for subfolder in subfolders)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.is_dir()


def _kinds(entries: Sequence[os.DirEntry[str]]) -> str:
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
