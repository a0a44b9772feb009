"""One entrance for every kind of source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from gankernels.data import cifar10, folder, idx, npz
from gankernels.data.images import ImageData
from gankernels.data.pixels import convert_channels, resize
from gankernels.data.stream import ImageFiles

_ACCEPTED = (
    "'digits', a folder with train-images-idx3-ubyte[.gz] and its labels, such an images file, "
    "a folder with one subfolder of images per class, "
    "the CIFAR-10 python archive (.tar.gz) or its folder, or an .npz with images and labels"
)


@overload
def load(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    stream: Literal[False] = False,
) -> ImageData: ...
@overload
def load(
    source: str | Path, *, size: int | None = None, channels: int | None = None, stream: bool
) -> ImageData | ImageFiles: ...
def load(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    stream: bool = False,
) -> ImageData | ImageFiles:
    """Read a labelled image set into memory as uint8, or list the files of a large one.

    Args:
        source: one of

            - ``"digits"``: the 1,797 handwritten 8x8 digits that come with scikit-learn;
            - a folder in IDX format (the MNIST family): ``train-images-idx3-ubyte`` and
              ``train-labels-idx1-ubyte``, gzipped or not; or one images file, whose labels file
              lies beside it;
            - a folder whose subfolders are the classes and hold image files;
            - the "python version" of CIFAR-10, as ``.tar.gz`` or unpacked: its training images;
            - an ``.npz`` with ``images``, uint8 ``(N, H, W)``, ``(N, H, W, C)`` or
              ``(N, C, H, W)``, and ``labels``, integers or strings ``(N,)``.
        size: height and width to return. The central square of each image is resized, bilinearly
            with antialiasing. ``None`` keeps the size, which must be the same for all and square.
        channels: 1 converts colour to luma, 3 repeats grey. ``None`` keeps what is stored (an
            image folder is grey if every file is).
        stream: return an image folder as :class:`ImageFiles`, which are decoded when they are
            asked for. With ``size`` and ``channels`` given, no file is opened before. The other
            kinds of source are read into memory all the same.

    The classes are the sorted distinct labels, or the names of the folders.

    Raises:
        TypeError, ValueError: wrong arguments, or a source that is unknown, empty, without labels,
            damaged, or of several sizes where ``size`` is not given. The file is named.
        ImportError: a library of ``gankernels[train]`` is needed and missing.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a str or a Path, got {type(source).__name__}")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"size must be an int or None, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")

    if source == "digits":
        name, (images, labels, classes) = "digits", _read_digits()
    else:
        path = Path(source)
        name = path.resolve().name
        if path.is_dir():
            os.scandir(path).close()  # a folder that may not be read is the error, not its files
        if stream and _is_image_folder(path):
            found = folder.scan(path, size, channels)
            return ImageFiles(name=name, **vars(found))
        images, labels, classes = _read_path(path, size, channels)

    if images.shape[2] != images.shape[3] and size is None:
        height, width = images.shape[2:]
        raise ValueError(
            f"{source}: images are {height}x{width}, not square; give size= to cut and resize them"
        )
    if channels is not None:
        images = convert_channels(images, channels)
    if size is not None:
        images = resize(images, size)
    return ImageData(images.contiguous(), labels, classes, name)


def _read_path(
    path: Path, size: int | None, channels: int | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    if path.is_dir():
        if images_file := idx.find(path):
            return _index(*idx.read(images_file))
        if cifar10.is_folder(path):
            return cifar10.read_folder(path)
        return folder.read(path, size, channels)
    if path.is_file():
        if idx.is_images_file(path):
            return _index(*idx.read(path))
        if path.suffix == ".npz":
            return _index(*npz.read(path))
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return cifar10.read_archive(path)
        raise ValueError(f"source {str(path)!r} is of no known kind; accepted: {_ACCEPTED}")
    raise ValueError(
        f"source {str(path)!r} is not the name of a data set, a file or a folder; "
        f"accepted: {_ACCEPTED}"
    )


def _is_image_folder(path: Path) -> bool:
    return path.is_dir() and not idx.find(path) and not cifar10.is_folder(path)


def _read_digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn: pip install gankernels[train]"
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return _index(torch.from_numpy(pixels).unsqueeze(1), digits.target)


def _index(images: Tensor, values: np.ndarray) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Replace label values by indices into the sorted distinct ones, which name the classes."""
    distinct, labels = np.unique(values, return_inverse=True)
    labels = torch.from_numpy(labels.astype(np.int64).reshape(-1))
    return images, labels, tuple(str(value) for value in distinct)
