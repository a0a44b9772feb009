"""Opens data of every kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gankernels._options import names
from gankernels._paths import expand
from gankernels.data import folder
from gankernels.data._columns import Data
from gankernels.data._files import either, special
from gankernels.data._kind import Kind, get_kind, kind_name, kinds
from gankernels.data._search import search


def load(source: str | Path, **options: Any) -> Data:
    """Open a data set: a name, a file or a folder of one of the kinds in `kinds()`.

    Args:
        source: one of

            - ``"digits"``: the 1,797 handwritten 8x8 digits that come with scikit-learn;
            - a folder in IDX format (the MNIST family): ``train-images-idx3-ubyte`` and
              ``train-labels-idx1-ubyte``, gzipped or not; or one images file, whose labels file
              is in the same folder. EMNIST's images, which are stored transposed, are turned
              upright; from QMNIST's labels the class is taken;
            - a folder whose subfolders are the classes and hold image files;
            - the "python version" of CIFAR-10 or CIFAR-100, as ``.tar.gz`` or unpacked: its
              training images, with the fine labels;
            - an ``.npz`` with ``images``, uint8 ``(N, H, W)``, ``(N, H, W, C)`` or
              ``(N, C, H, W)``, and ``labels``, integers or strings ``(N,)``;
            - a folder that contains one of these packed sets, such as the ``root`` to which
              torchvision downloads;
            - any source that a registered kind accepts.

            ``~`` is the home folder; a folder called digits is ``"./digits"``. ``"kind:source"``
            chooses the kind if several accept the source.
        options: fields of the kind's `Options`. All of the above are image kinds and accept

            - ``size``: height and width. The central square of each image is resized, bilinearly
              with antialiasing. ``None`` keeps the size, which must be the same for all and square;
              it is the default except for the digits, which are resized to 28;
            - ``channels``: 1 converts color to luma, 3 repeats gray. ``None`` keeps the stored
              channels (an image folder is gray if every file is);
            - ``stream``: open an image folder as :class:`ImageFiles`, which are decoded when they
              are drawn. With ``size`` and ``channels`` given, no file is opened before. Other kinds
              are read into memory regardless.

    The classes are the sorted distinct labels, or the names of the folders. Names sort as text, as
    in torchvision: a folder "10" comes before a folder "2".

    Raises:
        TypeError, ValueError: wrong options, or a source that is unknown, ambiguous, empty, without
            labels, damaged, larger than memory, or of several sizes if ``size`` is not given.
            The file is named. Only regular files are opened.
        ImportError: a library of ``gankernels[train]`` is missing.
    """
    kind, path, found = _locate(source)
    if unknown := options.keys() - names(kind.Options):
        takes = ", ".join(sorted(names(kind.Options))) or "no options"
        raise TypeError(f"{kind_name(kind)} takes {takes}, got {', '.join(sorted(unknown))}")
    # Path.resolve() fails for circular links.
    name = path if path in kind.names else os.path.basename(os.path.realpath(expand(path)))
    return kind.open(found, kind.Options(**options), name)


def split(source: str) -> tuple[type[Kind] | None, str]:
    """The kind that `"kind:source"` names, if any, and the source."""
    prefix, colon, rest = source.partition(":")
    return (get_kind(prefix), rest) if colon and prefix in kinds() else (None, source)


def kind_of(source: str) -> type[Kind]:
    """The kind of a source; a named kind is not checked. Raises ValueError for unknown sources."""
    kind, _ = split(source)
    return kind or _locate(source)[0]


def exists(source: str) -> bool:
    """Whether a source that names its kind exists."""
    kind, path = split(source)
    return path in (kind or kind_of(source)).names or expand(path).exists()


def canonical(source: str | Path) -> str:
    """The same data as `"kind:path"` with an absolute path, which works from any folder.

    The name of a data set is unchanged: ``"digits"``, even if a folder has this name
    (``"./digits"`` is the folder). So is a source that does not exist.
    """
    try:
        kind, path, _ = _locate(source)
    except (ValueError, OSError):
        return os.fspath(source)
    return path if path in kind.names else f"{kind_name(kind)}:{expand(path).resolve()}"


def _locate(source: str | Path) -> tuple[type[Kind], str, str]:
    """The kind of a source, the source without its kind, and the exact path of the data."""
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source must be a str or a Path, got {type(source).__name__}")
    named, path = split(source) if isinstance(source, str) else (None, os.path.join(".", source))
    candidates = [named] if named else [get_kind(name) for name in kinds()]
    for kind in candidates:
        if path in kind.names:
            return kind, path, path
    place = expand(path)
    accepted = ", ".join(kind.accepted for kind in candidates)
    if not path or not os.path.exists(place):
        raise ValueError(
            f"source {path!r} is not the name of a data set, a file or a folder; "
            f"accepted: {accepted}"
        )
    if not place.is_dir() and (what := special(place)):
        raise ValueError(f"source {path!r} must be a file or a folder, got {what}")
    # Pictures may be in the same folder as files of another kind.
    others = [kind for kind in candidates if kind is not folder.Folder]
    found = [kind for kind in others or candidates if kind.accepts(place)]
    if not found and folder.Folder in candidates and folder.Folder.accepts(place):
        found = [folder.Folder]
    if len(found) > 1:
        ways = either(f"{kind_name(kind)}:{path}" for kind in found)
        raise ValueError(f"source {path!r} may be of several kinds; load {ways} instead")
    if found:
        return found[0], path, str(place)
    if not place.is_dir():
        raise ValueError(f"source {path!r} is of no known kind; accepted: {accepted}")
    sets = search(place, candidates)
    if named and len(sets) > 1:
        raise ValueError(f"{place}: several data sets; load {either(p for _, p in sets)} instead")
    if len(sets) == 1 and (named or not any(folder.search(place))):
        return sets[0][0], path, str(sets[0][1])
    # At best it is an image folder: the error will name what is missing, and what to load instead.
    return named or folder.Folder, path, str(place)
