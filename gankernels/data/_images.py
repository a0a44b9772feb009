"""Labeled images in memory, and the options of all kinds of image data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gankernels._options import option
from gankernels.data._fields import Image, Label, Spec
from gankernels.data._files import check_memory
from gankernels.data._kind import DataOptions
from gankernels.data._pixels import convert_channels, resize


@dataclass(frozen=True)
class ImageOptions(DataOptions):
    """The settings of all kinds of image data."""

    size: int | None = option(None, "resize images to size x size (default: as stored)")
    channels: int | None = option(None, "1 (gray) or 3 (color) (default: as stored)")
    stream: bool = option(False, "decode the files of an image folder when they are drawn")

    def __post_init__(self) -> None:
        if self.size is not None:
            if not isinstance(self.size, int) or isinstance(self.size, bool):
                raise TypeError(f"size must be an int or None, got {type(self.size).__name__}")
            if self.size < 1:
                raise ValueError(f"size must be at least 1, got {self.size}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1, 3 or None, got {self.channels!r}")

    def settled(self, spec: Spec) -> ImageOptions:
        field = spec.get("images")
        if not isinstance(field, Image) or field.height != field.width:
            return self
        return replace(self, size=field.height, channels=field.channels)

    def in_memory(self) -> ImageOptions:
        return replace(self, stream=False)


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """A labeled set of square images.

    Args:
        images: uint8 tensor ``(N, C, S, S)``, N >= 1, C 1 (gray) or 3 (RGB).
        labels: int64 tensor ``(N,)`` of indices into ``classes``.
        classes: the name of each class.
        name: the name of the set in logs and reports.
        source: digest of the pixels and labels before resizing, which rounds differently on
            different processors; None if the images are as stored.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    source: str | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        for argument, value, dtype in (
            ("images", images, torch.uint8),
            ("labels", labels, torch.int64),
        ):
            if not isinstance(value, Tensor):
                raise TypeError(f"{argument} must be a Tensor, got {type(value).__name__}")
            if value.dtype != dtype:
                raise TypeError(f"{argument} must be {dtype}, got {value.dtype}")
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (N, 1 or 3, S, S), got {tuple(images.shape)}")
        if images.shape[2] != images.shape[3] or 0 in images.shape:
            raise ValueError(
                f"images must be square and not empty, got {tuple(images.shape)}; "
                "load them with size= to cut and resize them"
            )
        if labels.shape != (len(images),):
            raise ValueError(
                f"labels must be one per image, ({len(images)},), got {tuple(labels.shape)}"
            )
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(
                f"labels must be in [0, {len(self.classes)}), the number of classes, "
                f"got {labels.min()}..{labels.max()}"
            )

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"ImageData({self.name!r}: {len(self)} images, "
            f"{self.channels}x{self.size}x{self.size}, {self.num_classes} classes)"
        )

    @property
    def spec(self) -> Spec:
        return Spec(images=Image(*self.images.shape[1:]), labels=Label(self.classes))

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"images": self.images, "labels": self.labels}

    @property
    def tables(self) -> tuple[ImageData]:
        return (self,)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: column[rows] for name, column in self.columns.items()}

    def digest(self) -> str:
        """SHA-256 (hex) of pixels, labels and class names: equal for equal content."""
        return digest_of(self.images, self.labels, self.classes)

    def identity(self) -> str:
        """A digest of the stored content, by which a checkpoint recognizes the set."""
        return self.source or digest_of(self.images, self.labels)

    def split(self, held_out: float = 0.2, seed: int = 0) -> tuple[ImageData, ImageData]:
        """Split into (training, held-out) with the class proportions of the whole.

        Of each class the share ``held_out`` is held out, rounded, but at least one image is kept
        for training and, if there are two, at least one is held out. The same seed gives the same
        split.

        Raises:
            ValueError: ``held_out`` is outside (0, 1), or no class has two images.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {held_out}")
        generator = torch.Generator().manual_seed(seed)
        labels = self.labels.cpu()
        is_held_out = torch.zeros(len(self), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (labels == label).nonzero().flatten()
            count = min(max(round(len(members) * held_out), 1), max(len(members) - 1, 0))
            order = torch.randperm(len(members), generator=generator)
            is_held_out[members[order[:count]]] = True
        if not is_held_out.any():
            raise ValueError(f"{self.name}: cannot split, every class has a single image")
        return self._select(~is_held_out), self._select(is_held_out)

    def _select(self, mask: Tensor) -> ImageData:
        mask = mask.to(self.images.device)
        return ImageData(self.images[mask], self.labels[mask], self.classes, self.name)


def digest_of(images: Tensor, labels: Tensor, *more: object) -> str:
    digest = hashlib.sha256(repr((tuple(images.shape), *more)).encode())
    for tensor in (images, labels):
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def image_data(
    images: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    source: str,
    options: ImageOptions,
    name: str,
) -> ImageData:
    """Convert stored images, uint8 `(N, C, H, W)`, to the size and channels of the options.

    Raises ValueError, beginning with `source`, if they are not square or too large for memory.
    """
    size, channels = options.size, options.channels
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
    digest = digest_of(stored, labels) if resized else None
    return ImageData(images.contiguous(), labels, classes, name, digest)


def numbered(values: np.ndarray) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as indices into their sorted distinct values, and these as names of the classes."""
    distinct, labels = np.unique(values, return_inverse=True)
    indices = torch.from_numpy(labels.astype(np.int64).reshape(-1))
    return indices, tuple(str(value) for value in distinct)
