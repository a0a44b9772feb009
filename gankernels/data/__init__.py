"""Labelled images as one uint8 tensor, from whatever they are stored in."""

from gankernels.data.images import ImageData, to_float, to_uint8
from gankernels.data.load import load

__all__ = ["ImageData", "load", "to_float", "to_uint8"]
