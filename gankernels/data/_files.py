"""Finds and opens the files of data sets, which are not trusted."""

from __future__ import annotations

import gzip
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from gankernels._memory import available

#: Names that file systems, archivers and NAS add to folders of data, besides those with a dot.
_JUNK = frozenset(
    {
        "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle",
        "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
        "network trash folder", "recycler", "system volume information", "temporary items",
        "thumbs.db",
    }
)  # fmt: skip
_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Less than this is read in any case; above it, images are never compressed 200-fold.
_SMALL = 1 << 30
_EXPANSION = 200


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The entries of a folder without hidden files and junk, by name."""
    with os.scandir(folder) as entries:
        return sorted(
            (e for e in entries if not e.name.startswith(".") and e.name.lower() not in _JUNK),
            key=lambda entry: entry.name,
        )


def suffixes(names: Iterable[str]) -> str:
    """The most frequent kinds of files in words: "120 .mat, 3 .txt"."""
    kinds = Counter(os.path.splitext(name)[1].lower() or "without an extension" for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))


def either(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Paths in words: "a, b or c"; if there are many, only the first."""
    names = [os.fspath(path) for path in paths]
    shown = names[:6]
    if len(names) > len(shown):
        return f"{', '.join(shown)} or another of {len(names)}"
    *most, last = shown
    return f"{', '.join(most)} or {last}" if most else last


def special(path: str | os.PathLike[str]) -> str | None:
    """The kind of a path that is not a regular file, in words; None for a regular file.

    Nothing is opened: opening a pipe waits for a writer, opening a device may do anything.
    """
    return _special(os.stat(path))


def _special(status: os.stat_result) -> str | None:
    if stat.S_ISREG(status.st_mode):
        return None
    return next((name for is_kind, name in _SPECIAL if is_kind(status.st_mode)), "something else")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises:
        ValueError: it is not a regular file. The message does not name it.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # it may be replaced meanwhile

    if kind := special(path):
        raise ValueError(f"must be a regular file, got {kind}")
    file = open(path, "rb", opener=opener)  # noqa: SIM115
    if kind := _special(os.fstat(file.fileno())):
        file.close()
        raise ValueError(f"must be a regular file, got {kind}")
    return file


@contextmanager
def open_unpacked(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file's content, decompressed if it is gzip, and its size on disk."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # By content, not by name: downloads are often unpacked already under a name with .gz.
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            yield file, size
            return
        with gzip.open(file) as unpacked:
            yield cast(BinaryIO, unpacked), size


def check_promise(promised: int, stored: int) -> None:
    """Refuse a decompression bomb by the size in its header, before it is read.

    Raises:
        ValueError: the promised size is implausible. The message does not name the file.
    """
    if promised > max(_SMALL, _EXPANSION * stored):
        raise ValueError(
            f"{stored:,} bytes promise {promised:,}, as no images compress; if they are right, "
            "store them uncompressed"
        )
    check_memory(promised)


def check_memory(needed: int) -> None:
    """Raise ValueError if more bytes are needed than are free."""
    free = available()
    if free is not None and needed > free:
        raise ValueError(f"needs {needed:,} bytes of memory, {free:,} are free")


def one_line(error: BaseException) -> str:
    """The message of an error in one line; its type if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__
