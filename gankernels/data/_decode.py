"""Image files, decoded with Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from gankernels.data._pillow import import_pillow, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
Result = TypeVar("Result")

# Files per batch of tasks, so that a folder of millions does not create millions of tasks.
_AHEAD = 1024
_GRAY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"})
# In 32-bit and floating-point images it is undefined which values are black and white.
_NO_RANGE = frozenset({"I", "F"})
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def decode(file: bytes, size: int, channels: int) -> Tensor:
    """One image as uint8 ``(C, S, S)``."""
    pixels = _decode(os.fsdecode(file), size, channels)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``function`` of every item in order, computed by threads a limited number of items ahead."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _AHEAD):
            yield from pool.map(function, items[start : start + _AHEAD])


def read_header(file: str) -> tuple[bool, tuple[int, int]]:
    """Whether an image is gray, and its width and height."""
    with open_image(file) as image:
        _deep_bits(image)
        # Pillow opens a PNG of 16-bit gray with alpha as RGBA.
        tile = getattr(image, "tile", None)
        stored = tile[0].args if tile else None
        return image.mode in _GRAY_MODES or "LA;16B" in (stored, *(stored or ())), image.size


def _deep_bits(image: Image) -> int:
    """The bits per pixel of a gray image with more than eight, otherwise 0."""
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
        if image.mode in ("La", "RGBa"):  # premultiplied alpha, with this conversion only
            image = image.convert(image.mode.upper())
        if "A" in image.getbands() or "transparency" in image.info:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque.convert("RGB")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            # Cut, then resize: in a single call the filter would read beyond the square.
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(image)
