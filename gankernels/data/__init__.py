"""Data sets as named columns, from whatever they are stored in."""

from gankernels.data.columns import Columns, Data, Table, Unpaired
from gankernels.data.fields import Field, Image, Label, Point, Spec, Tokens, Vector, image_spec
from gankernels.data.images import ImageData
from gankernels.data.load import absolute, load
from gankernels.data.pixels import to_float, to_uint8
from gankernels.data.stream import BatchLoader, ImageFiles

__all__ = [
    "BatchLoader",
    "Columns",
    "Data",
    "Field",
    "Image",
    "ImageData",
    "ImageFiles",
    "Label",
    "Point",
    "Spec",
    "Table",
    "Tokens",
    "Unpaired",
    "Vector",
    "absolute",
    "image_spec",
    "load",
    "to_float",
    "to_uint8",
]
