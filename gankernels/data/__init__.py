"""Labelled images as uint8, from whatever they are stored in."""

from gankernels.data.images import ImageData, to_float, to_uint8
from gankernels.data.load import absolute, load
from gankernels.data.stream import BatchLoader, ImageFiles

__all__ = ["BatchLoader", "ImageData", "ImageFiles", "absolute", "load", "to_float", "to_uint8"]
