"""numpy's .npz with two arrays, ``images`` and ``labels``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read(path: Path) -> tuple[Tensor, np.ndarray]:
    """Images uint8 ``(N, C, H, W)`` and labels ``(N,)``, integers or strings."""
    # Asked first: numpy takes anything else for a pickle, and recommends to trust it.
    if not zipfile.is_zipfile(path):
        with open(path, "rb"):  # where it cannot be opened at all, that is the error
            raise ValueError(f"{path}: not a readable .npz of plain arrays: not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            images = archive["images"] if "images" in names else None
            labels = archive["labels"] if "labels" in names else None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz of plain arrays: {error}") from error
    for name, array in (("images", images), ("labels", labels)):
        if array is None:
            raise ValueError(f"{path}: no array {name!r} among {names}")
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images must be uint8 in 0..255, got {images.dtype}")
    if labels.dtype.kind not in "iuU":
        raise ValueError(f"{path}: labels must be integers or strings, got {labels.dtype}")
    images = _channels_first(path, images)
    if labels.size != len(images):
        raise ValueError(
            f"{path}: labels must be one per image, ({len(images)},), got {labels.shape}"
        )
    return torch.from_numpy(images), labels.reshape(-1)


def _channels_first(path: Path, images: np.ndarray) -> np.ndarray:
    shape = images.shape
    if 0 in shape:
        raise ValueError(f"{path}: images are empty, their shape is {shape}")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and shape[1] in (1, 3):
        return images
    if images.ndim == 4 and shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise ValueError(
        f"{path}: images must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, got {shape}"
    )
