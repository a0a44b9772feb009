"""Conversions between pixels and the values of networks, between sizes and between colors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Conversions through float32 take this many pixels at a time, or an image, so that a uint8 data set
# never exists as a whole in four times its size.
_CHUNK = 1 << 24


def to_float(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to the range [-1, 1] of a tanh generator: 0 to -1, 255 to 1. Any shape."""
    if x.dtype != torch.uint8:
        raise TypeError(f"x must be torch.uint8, got {x.dtype}")
    # Computed in float32 and rounded once: half precision would round division and shift.
    return (x.float() if dtype != torch.float64 else x.double()).div_(127.5).sub_(1).to(dtype)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 pixels: to the nearest level, values outside clamped. Any shape.

    The inverse of :func:`to_float`. Not differentiable. NaN becomes 0.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return ((x + 1) * 127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """The central square of uint8 ``(N, C, H, W)`` as ``(N, C, size, size)``, bilinear.

    Antialiased, as Pillow's ``BILINEAR`` is: shrinking averages instead of skipping pixels.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images.contiguous()
    result = images.new_empty(*images.shape[:2], size, size)
    for source, target in _chunks(images, result):
        scaled = F.interpolate(source.float(), (size, size), mode="bilinear", antialias=True)
        target.copy_(scaled.round_().clamp_(0, 255))
    return result


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 ``(N, 1 or 3, H, W)`` with ``channels`` channels: luma (ITU-R 601) or gray repeated."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    result = images.new_empty(len(images), 1, *images.shape[2:])
    for source, target in _chunks(images, result):
        red, green, blue = source.int().unbind(1)
        # Pillow's fixed-point weights, so that a folder and an array give the same gray.
        target[:, 0] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return result


def _chunks(images: Tensor, result: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    pixels = max(images[0].numel(), result[0].numel())
    rows = max(_CHUNK // pixels, 1)
    return zip(images.split(rows), result.split(rows), strict=True)
