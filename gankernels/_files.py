"""Atomic file writes.

Everything that the package writes goes through this module, which has four rules. Only regular
files are replaced; pipes and devices are written to. Links are followed. A file is written under a
unique name, and no other process's files are touched. A replaced file keeps its mode and its owner.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gankernels._console import describe, warn
from gankernels._memory import require, size

#: Bytes that file systems allow a name.
LONGEST_NAME = 255
#: Errors that mean that a folder or file system does not support an operation, not that it failed.
UNSUPPORTED = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOLCK,
    errno.ENOTTY, errno.EROFS,
}  # fmt: skip

DAY = 24 * 60 * 60.0

_TEMPORARY = re.compile(r"\.gankernels-\d+-[0-9a-f]{16}\.tmp")
_unsynced: set[str] = set()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file next to `path`, fsync it, rename it to `path`.

    If anything fails (a full disk, a kill), `path` keeps its old content or does not exist. A link
    stays, and its target is replaced. A pipe or a device is written to.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    old = _stat(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is where the file is to be", str(path))
    descriptor = _named_descriptor(path)
    if descriptor is not None or (old is not None and not stat.S_ISREG(old.st_mode)):
        _write_through(path, descriptor, write)
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handled = sys.exc_info()[1]
    try:
        with temporary_file(target.parent) as (file, temporary):
            write(file)
            file.flush()
            if old is not None:
                _adopt(file.fileno(), old)
            _sync(file.fileno(), path)
            os.replace(temporary, target)
    except BaseException as error:
        # A library may turn an interruption into a RuntimeError.
        if interruption := _interruption(error, handled):
            raise interruption from None
        if isinstance(error, OSError) and _is_temporary(error.filename):
            # Name `path`: the error may name the temporary file, or on a full disk nothing.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file in `folder` that is deleted after the block unless it was renamed.

    It is locked as long as its process lives, so that other processes recognize leftovers.
    """
    while True:
        path, number = create_temporary(folder)
        with open(number, "wb") as file:
            # Another process that cleans up may have deleted the file just before it was locked.
            if not (_lock(number) and not path.exists()):
                try:
                    yield file, path
                finally:
                    path.unlink(missing_ok=True)
                return


def create_temporary(folder: Path) -> tuple[Path, int]:
    path = temporary_name(folder)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return path, beyond_streams(number)


def temporary_name(folder: Path) -> Path:
    """A unique name in `folder`, short however long the file's name is."""
    return folder / f".gankernels-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def delete_leftovers(*folders: Path) -> None:
    """Delete the temporary files that killed processes have left in `folders`."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                if _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        _delete_leftover(entry.path)


def _delete_leftover(path: str) -> None:
    # Open for writing, since locks over NFS need that.
    number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = True
    except BlockingIOError:
        abandoned = False
    except OSError:  # a file system without locks
        abandoned = time.time() - os.fstat(number).st_mtime > DAY
    finally:
        os.close(number)
    if abandoned:
        os.unlink(path)


def copy_atomically(source: Path, path: Path) -> None:
    """Give `path` the content of `source`, as a hard link if the file system supports them."""
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target.parent)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(path, lambda file: _pour(source, file))
        return
    try:
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def fill_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, whose content is at `path` after the block, or not at all.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    target = Path(os.path.realpath(path))
    exists = target.exists()
    if exists and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{path} already exists: choose a new or an empty folder")
    # An existing folder is kept: it may be a mount, or the working directory of a shell.
    temporary = temporary_name(target if exists else target.parent)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        if exists:
            for entry in sorted(temporary.iterdir()):
                os.rename(entry, target / entry.name)
            temporary.rmdir()
        else:
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def make_way(path: Path) -> None:
    """Set aside what blocks a file at `path`: something else there, or a parent that is a file."""
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        set_aside(path.parent, "is not a folder")
    if path.exists() and not path.is_file():
        set_aside(path, "is not a file")


def set_aside(path: Path, why: str) -> Path:
    """Rename an unusable file to a free name with ".damaged", and warn; returns the new path."""
    for i in range(10_000):
        suffix = ".damaged" if i == 0 else f".damaged-{i}"
        stem = os.fsencode(path.name)[: LONGEST_NAME - len(suffix)]
        aside = path.with_name(os.fsdecode(stem) + suffix)
        if not os.path.lexists(aside):
            break
    os.rename(path, aside)
    warn(f"{path} {why}: it is kept as {aside.name}, and the run continues without it")
    return aside


def append(path: Path, content: bytes) -> None:
    """Write to the end of a file, which is created if it does not exist."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(beyond_streams(os.open(target, flags, 0o666)), "ab") as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk: a rename is durable only after that."""
    try:
        number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        _warn_unsynced(folder, error)


def _sync(number: int, path: Path) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_unsynced(path.parent, error)


def _warn_unsynced(folder: Path, error: OSError) -> None:
    if str(folder) not in _unsynced:
        _unsynced.add(str(folder))
        warn(
            f"{folder} cannot be synchronized with its disk ({error.strerror}): "
            "the newest files may be lost if the power fails"
        )


def beyond_streams(number: int) -> int:
    """A file descriptor beyond those of the standard streams, which other code writes to."""
    if number > 2:
        return number
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(number)


def _lock(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def is_stdout(path: Path) -> bool:
    """Whether `path` is this process's standard output."""
    if _named_descriptor(path) == 1:
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _named_descriptor(path: Path) -> int | None:
    """The number of the descriptor that a path such as /dev/stdout or /dev/fd/3 refers to."""
    name = os.path.abspath(path)
    for _ in range(40):
        folder, last = os.path.split(name)
        folder = os.path.realpath(folder)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd", folder) and last.isdecimal():
            return int(last)
        name = os.path.join(folder, last)
        if not os.path.islink(name):
            break
        name = os.path.join(folder, os.readlink(name))
    return None


def _write_through(path: Path, descriptor: int | None, write: Callable[[BinaryIO], object]) -> None:
    with tempfile.TemporaryFile() as whole:  # writing archives needs to seek
        write(whole)
        whole.seek(0)
        number = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
        with open(number, "wb") as file:
            shutil.copyfileobj(whole, file)


def _adopt(number: int, old: os.stat_result) -> None:
    """Give a new file the owner and the mode of the replaced one, as far as permitted."""
    new = os.fstat(number)
    with contextlib.suppress(OSError):
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(number, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(number, stat.S_IMODE(old.st_mode))


def _interruption(
    error: BaseException | None, handled: BaseException | None
) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit, if any, that caused an exception.

    Those that were already being handled when the write began do not count.
    """
    while error is not None and error is not handled:
        if not isinstance(error, Exception):
            return error
        error = error.__context__
    return None


def _is_temporary(name: Any) -> bool:
    return name is None or _TEMPORARY.fullmatch(os.path.basename(os.fsdecode(name))) is not None


def _pour(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as opened:
        shutil.copyfileobj(opened, file)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def require_disk(needed: int, path: Path, what: str) -> None:
    """Raises ValueError, beginning with `what`, if the disk of `path` has fewer free bytes."""
    folder = path.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{what} needs {size(needed)} of disk or more, {size(free)} are free")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for others: a FIFO would block forever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, if it is not JSON."""
    with open_regular(path) as file:
        require(10 * os.fstat(file.fileno()).st_size, f"reading {path}")
        content = file.read()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        raise ValueError(f"{path} is not a JSON file: {describe(error)}") from error
