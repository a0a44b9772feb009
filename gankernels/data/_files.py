"""Files that others made: which of them are looked at, and how they are opened."""

from __future__ import annotations

import gzip
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from gankernels._memory import available

#: What file systems, archivers and NAS put beside data, besides names that start with a dot.
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
# Less than this is read whatever it expands to; of more, images never take 200 times less.
_SMALL = 1 << 30
_EXPANSION = 200


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What a folder holds without hidden files and junk, by name."""
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
    """Paths in words: "a, b or c", of many the first."""
    names = [os.fspath(path) for path in paths]
    shown = names[:6]
    if len(names) > len(shown):
        return f"{', '.join(shown)} or another of {len(names)}"
    *most, last = shown
    return f"{', '.join(most)} or {last}" if most else last


def special(path: str | os.PathLike[str]) -> str | None:
    """What is there in place of a regular file, in words; None for a regular file.

    Nothing is opened: opening a pipe waits for a writer, opening a device may do anything.
    """
    return _special(os.stat(path))


def _special(status: os.stat_result) -> str | None:
    if stat.S_ISREG(status.st_mode):
        return None
    return next((name for is_kind, name in _SPECIAL if is_kind(status.st_mode)), "something else")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open for reading what is a regular file, perhaps through links.

    Raises:
        ValueError: it is none. The text does not name it.
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
    """A regular file's content, from within gzip if it is in gzip, and its size as it is stored."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # By content, not by name: downloads often arrive unpacked under a name that ends in .gz.
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            yield file, size
            return
        with gzip.open(file) as unpacked:
            yield cast(BinaryIO, unpacked), size


def check_promise(promised: int, stored: int) -> None:
    """Refuse what a header promises before it is read, where it can be nothing but a bomb.

    Raises:
        ValueError: the text names no file.
    """
    if promised > max(_SMALL, _EXPANSION * stored):
        raise ValueError(
            f"{stored:,} bytes promise {promised:,}, as no images compress; if they are right, "
            "store them uncompressed"
        )
    check_memory(promised)


def check_memory(needed: int) -> None:
    """Raise ValueError for more bytes than there are."""
    free = available()
    if free is not None and needed > free:
        raise ValueError(f"needs {needed:,} bytes of memory, {free:,} are free")


def one_line(error: BaseException) -> str:
    """What an error says, without line ends; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
