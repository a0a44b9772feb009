"""The one place where Pillow opens a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from gankernels.data._files import one_line, open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

#: Decoders that neither start programs nor read other files. By default Pillow detects formats by
#: content, and passes PostScript to Ghostscript under any name.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Names of such files.
SUFFIXES = frozenset(
    {
        ".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
        ".ppm", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip


def import_pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "reading image files needs Pillow: pip install gankernels[train]"
        ) from error
    return Image, ImageOps


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image]:
    """Open a regular file as a Pillow image.

    Raises:
        ValueError: it is of another format, damaged, too large for Pillow or not a regular file,
            also if Pillow detects this inside the `with` block. The file is named.
    """
    Image, _ = import_pillow()
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except Exception as error:  # a damaged file can make Pillow raise anything
        reason = one_line(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise ValueError(f"{path}: not a readable image: {reason}") from error
