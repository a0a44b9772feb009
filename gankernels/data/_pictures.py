"""Grids of images as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gankernels._files import write_atomically
from gankernels._paths import expand
from gankernels.data._pixels import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image


def arrange(count: int, labels: list[int] | None) -> tuple[Tensor | None, int]:
    """Labels for `count` images, the given ones in turn, and a number of columns for a grid.

    The columns are a multiple of the labels if these are few, so that a column is one class.
    """
    side = max(1, round(math.sqrt(count)))
    if labels is None:
        return None, side
    cycled = torch.tensor(labels).repeat(-(-count // len(labels)))[:count]
    few = len(labels) <= 2 * side
    return cycled, len(labels) * max(1, side // len(labels)) if few else side


def make_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """uint8 `(N, C, H, W)` row by row as one `(C, rows (H + padding) + padding, ...)` image.

    Unfilled places, and the lines between images, are black.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = images.new_zeros(rows * columns, channels, height + padding, width + padding)
    cells[:n, :, padding:, padding:] = images
    cells = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    grid = cells.reshape(channels, rows * (height + padding), columns * (width + padding))
    return torch.nn.functional.pad(grid, (0, padding, 0, padding))


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """Write images `(N, C, H, W)`, C 1 or 3, uint8 or in [-1, 1], as one PNG."""
    pixels = images if images.dtype == torch.uint8 else to_uint8(images)
    picture = to_picture(make_grid(pixels.cpu(), columns))
    write_atomically(expand(path), lambda file: picture.save(file, "PNG"))


def to_picture(pixels: Tensor) -> Image:
    """uint8 `(C, H, W)` on the CPU, C 1 or 3, as a Pillow image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install gankernels[train]") from error
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())
