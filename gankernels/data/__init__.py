"""Data sets as named columns, from whatever they are stored in.

Every module in this directory whose name has no leading underscore is a kind of data, such as a
file format, and its name is what `load("kind:path")` and the command line call it: a new kind is a
new file, with no edit elsewhere. Other packages add theirs by `register` or by an entry point of
the group `gankernels.data`.
"""

from gankernels.data._columns import Columns, Data, Table, Unpaired
from gankernels.data._fields import Field, Image, Label, Point, Spec, Tokens, Vector, image_spec
from gankernels.data._image_files import ImageFiles
from gankernels.data._images import ImageData, ImageOptions
from gankernels.data._kind import DataOptions, Kind, get_kind, kind_name, kinds, register
from gankernels.data._load import canonical, exists, kind_of, load, split
from gankernels.data._loader import BatchLoader
from gankernels.data._pixels import to_float, to_uint8

__all__ = [
    "BatchLoader",
    "Columns",
    "Data",
    "DataOptions",
    "Field",
    "Image",
    "ImageData",
    "ImageFiles",
    "ImageOptions",
    "Kind",
    "Label",
    "Point",
    "Spec",
    "Table",
    "Tokens",
    "Unpaired",
    "Vector",
    "canonical",
    "exists",
    "get_kind",
    "image_spec",
    "kind_name",
    "kind_of",
    "kinds",
    "load",
    "register",
    "split",
    "to_float",
    "to_uint8",
]
