"""Sets of labeled image files that do not fit into memory: decoded when they are drawn."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gankernels.data._decode import decode, each
from gankernels.data._fields import Image, Label, Spec

#: The number of bytes of a set's files that its identity includes.
_SAMPLED = 256 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
class ImageFiles:
    """A labeled set of image files, which :func:`load` lists with ``stream=True``.

    Pixels are the same as in :class:`ImageData`. A damaged file is detected when it is read.

    Args:
        files: the encoded paths as an array ``(N,)``. The memory of a list of str would be copied
            in every process that reads it, as its reference counts change.
        labels: int64 tensor ``(N,)`` of indices into ``classes``.
        classes: the name of each class.
        size: height and width to which every image is cut and resized.
        channels: 1 (gray) or 3 (RGB).
        name: the name of the set in logs and reports.
    """

    files: np.ndarray
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    channels: int
    name: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return (
            f"ImageFiles({self.name!r}: {len(self)} images, "
            f"{self.channels}x{self.size}x{self.size}, {self.num_classes} classes)"
        )

    @property
    def spec(self) -> Spec:
        image = Image(self.channels, self.size, self.size)
        return Spec(images=image, labels=Label(self.classes))

    @property
    def columns(self) -> None:
        return None

    @property
    def tables(self) -> tuple[ImageFiles]:
        return (self,)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Decode the images of ``rows``, int64 ``(n,)``, into uint8 ``(n, C, S, S)``.

        Raises:
            ValueError: a file is missing or damaged; it is named.
        """
        images = torch.empty(len(rows), self.channels, self.size, self.size, dtype=torch.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            image.copy_(decode(self.files[row], self.size, self.channels))
        return {"images": images, "labels": self.labels[rows]}

    def identity(self) -> str:
        """A digest of the content, by which a checkpoint recognizes the set under any path.

        It covers the labels, the relative names and the sizes of all files, and the content of
        every k-th file. k is the least number with which about 256 MiB are read: 1 for a set that
        is no larger. Hence it detects any other size or name, and other content in k consecutive
        files.

        Raises:
            OSError: a file is missing or cannot be read.
        """
        names = [os.fsdecode(file) for file in self.files]
        parts = [names[i : i + 1024] for i in range(0, len(names), 1024)]
        sizes = np.concatenate(list(each(_sizes, parts)))
        top = len(os.path.commonpath({os.path.dirname(name) for name in names}))
        below = [name[top:].replace(os.sep, "/").encode(errors="surrogateescape") for name in names]
        digest = hashlib.sha256(b"\0".join(below))
        digest.update(sizes.data)
        digest.update(self.labels.numpy().astype("<i8").data)
        every = max(1, -(-int(sizes.sum()) // _SAMPLED))
        for content in each(_digest, names[::every]):
            digest.update(content)
        return digest.hexdigest()


def _sizes(names: list[str]) -> np.ndarray:
    return np.array([os.path.getsize(name) for name in names], dtype="<i8")


def _digest(name: str) -> bytes:
    with open(name, "rb") as file:
        return hashlib.sha256(file.read()).digest()
