"""One entrance for every kind of source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from gankernels._paths import expand
from gankernels.data import cifar, folder, idx, npz
from gankernels.data.files import check_memory, either, special, visible
from gankernels.data.images import ImageData, digest_of
from gankernels.data.pixels import convert_channels, resize
from gankernels.data.stream import ImageFiles

_ACCEPTED = (
    "'digits', a folder with train-images-idx3-ubyte[.gz] and its labels, such an images file, "
    "a folder with one subfolder of images per class, the python archive (.tar.gz) of CIFAR-10 or "
    "CIFAR-100 or its folder, an .npz with images and labels, or a folder with one of these in it"
)
# Levels down to which a folder is searched: of torchvision's it takes three, EMNIST/raw/gzip.
_DEPTH = 4


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
              lies beside it. EMNIST's images, which are stored on their side, are turned upright;
              of QMNIST's labels the class is taken;
            - a folder whose subfolders are the classes and hold image files;
            - the "python version" of CIFAR-10 or CIFAR-100, as ``.tar.gz`` or unpacked: its
              training images, with the fine labels;
            - an ``.npz`` with ``images``, uint8 ``(N, H, W)``, ``(N, H, W, C)`` or
              ``(N, C, H, W)``, and ``labels``, integers or strings ``(N,)``;
            - a folder in which one of these packed sets lies, such as the ``root`` to which
              torchvision downloads.

            ``~`` is the home folder; a folder called digits is ``"./digits"``.
        size: height and width to return. The central square of each image is resized, bilinearly
            with antialiasing. ``None`` keeps the size, which must be the same for all and square.
        channels: 1 converts colour to luma, 3 repeats grey. ``None`` keeps what is stored (an
            image folder is grey if every file is).
        stream: return an image folder as :class:`ImageFiles`, which are decoded when they are
            asked for. With ``size`` and ``channels`` given, no file is opened before. The other
            kinds of source are read into memory all the same.

    The classes are the sorted distinct labels, or the names of the folders. Names sort as text, as
    they do in torchvision: a folder "10" comes before a folder "2".

    Raises:
        TypeError, ValueError: wrong arguments, or a source that is unknown, empty, without labels,
            damaged, larger than memory, or of several sizes where ``size`` is not given. The file
            is named. Nothing is opened but regular files.
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
        path = expand(source)
        packed = _packed(path, source)
        name = os.path.basename(os.path.realpath(path))  # resolve() fails where links go round
        if packed is None:
            try:
                if stream:
                    return ImageFiles(name=name, **vars(folder.scan(path, size, channels)))
                images, labels, classes = folder.read(path, size, channels)
            except folder.NoClassesError as error:
                packed = _deeper(path, error)
        if packed is not None:
            images, labels, classes = _read_packed(packed)

    if images.shape[2] != images.shape[3] and size is None:
        height, width = images.shape[2:]
        raise ValueError(
            f"{source}: images are {height}x{width}, not square; give size= to cut and resize them"
        )
    try:
        check_memory(len(images) * (channels or images.shape[1]) * (size or images.shape[2]) ** 2)
    except ValueError as error:
        raise ValueError(f"{source}: {len(images)} images of size {size}: {error}") from error
    if channels is not None:
        images = convert_channels(images, channels)
    stored = images
    if size is not None:
        images = resize(stored, size)
    resized = images.shape != stored.shape
    source = digest_of(stored, labels) if resized else None
    return ImageData(images.contiguous(), labels, classes, name, source)


def absolute(source: str | Path) -> str:
    """What names the same source from any folder: a path that exists is made absolute.

    ``"digits"`` stays what it is, also where a folder has this name; ``"./digits"`` is the folder.
    """
    if source == "digits":
        return source
    path = expand(source)
    return str(path.resolve() if path.exists() else source)


def _packed(path: Path, source: str | Path) -> Path | None:
    """The images file, archive or folder of batches that is meant; None for another folder."""
    if not os.fspath(source) or not os.path.exists(path):
        raise ValueError(
            f"source {str(source)!r} is not the name of a data set, a file or a folder; "
            f"accepted: {_ACCEPTED}"
        )
    if not path.is_dir():
        if kind := special(path):
            raise ValueError(f"source {str(source)!r} must be a file or a folder, got {kind}")
        return path
    if cifar.is_folder(path):
        return path
    found = idx.find(path)
    if len(found) > 1:
        raise ValueError(f"{path}: several data sets; load {either(found)} instead")
    return found[0] if found else None


def _deeper(path: Path, error: folder.NoClassesError) -> Path:
    """The one packed set in a folder without classes of its own; otherwise the error says more."""
    packed, images = _sets(path), list(folder.search(path))
    if len(packed) == 1 and not images and not folder.has_classes(path):
        return packed[0]
    if found := packed + sorted(images, key=lambda each: not each.name.startswith("train")):
        raise ValueError(f"{error}; for what lies deeper load {either(found)} instead") from None
    if tests := _sets(path, training=False):
        raise ValueError(f"{path}: no training images; load {either(tests)} instead") from None
    raise error


def _sets(place: Path, training: bool = True, depth: int = _DEPTH) -> list[Path]:
    """What has the name of a packed set, in a folder or in the folders in it."""
    found = idx.find(place, training)
    if training:
        found += cifar.find(place) + npz.find(place)
    if depth:
        for entry in visible(place):
            if entry.is_dir():
                found += _sets(Path(entry), training, depth - 1)
    return list({path.resolve(): path for path in found}.values())


def _read_packed(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    if cifar.is_folder(path):
        return cifar.read_folder(path)
    if idx.is_images_file(path):
        return _index(*idx.read(path))
    if npz.is_file(path.name):
        return _index(*npz.read(path))
    if cifar.is_archive(path.name):
        return cifar.read_archive(path)
    raise ValueError(f"source {str(path)!r} is of no known kind; accepted: {_ACCEPTED}")


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
