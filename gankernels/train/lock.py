"""One process at a time in a run folder, also where several machines share the disk.

The folder's file `.lock` holds a record of the owner. The lock itself is the operating system's
lock on that file, which ends with the process, however that ends: a killed one blocks nobody.
Some network file systems keep such locks to one machine, or have none. Therefore the owner also
touches the file every few seconds, and a process that finds the record of another machine waits to
see whether the file is still touched. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from gankernels._console import warn
from gankernels._files import beyond_streams, make_way

FILE = ".lock"
#: Seconds between two signs of life, and seconds without one after which an owner counts as dead.
BEAT = 5.0
DEAD = 20.0


class RunLock:
    """The right to write into a run folder, from `acquire` to `release`."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self._file: int | None = None
        self._stop = threading.Event()
        self._record: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the lock, also from a process that no longer runs.

        Raises:
            ValueError: another process has it; it is named.
            OSError: the folder cannot be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        make_way(self.path)
        while self._file is None:
            number = beyond_streams(os.open(self.path, _FLAGS, 0o666))
            try:
                self._take(number)
                # The owner deletes the file before it lets go: then this was not the lock.
                if _is_at(number, self.path):
                    self._file = number
            finally:
                if self._file is None:
                    os.close(number)
        _open[id(self)] = self
        self._stop = threading.Event()
        threading.Thread(target=self._live, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Release the lock. Does nothing if it is not held."""
        if self._file is None:
            return
        self._stop.set()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        self._close()

    def check(self) -> None:
        """Raises ValueError if another process has taken the lock meanwhile.

        This happens if this process was suspended for long, and the other is on another machine.
        """
        if self._file is None or self._is_ours():
            return
        if record := _read(self.path):
            raise ValueError(f"{self.path.parent} was taken over by {describe(record)}")
        self._stop.set()  # the file was deleted
        self._close()
        self.acquire()

    def _take(self, number: int) -> None:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                time.sleep(0.1)  # it may be writing its record
                raise self._refusal(_read(number)) from None
            locks = False  # a file system without locks
        record = _read(number)
        if record is not None and self._lives(record, number, locks):
            raise self._refusal(record)
        self._record = _own_record()
        content = json.dumps(self._record).encode() + b"\n"
        os.ftruncate(number, 0)
        os.pwrite(number, content, 0)
        if not locks:  # of two processes that start at the same time, the later one wins
            time.sleep(min(1.0, BEAT))
            if _read(number) != self._record:
                raise self._refusal(_read(number))

    def _lives(self, record: dict[str, Any], number: int, locks: bool) -> bool:
        """Whether the owner in a record still runs."""
        here = _own_record()
        if record.get("boot") == here["boot"]:
            if locks:
                return False  # otherwise this process would not have got the lock
            if record.get("processes") == here["processes"]:
                return _started(record.get("pid")) == record.get("started")
        warn(
            f"{self.path.parent} was left by {describe(record)}: "
            f"waiting {DEAD:.0f} s to see whether it is still at work"
        )
        end, first = time.monotonic() + DEAD, _touched(self.path, number)
        while time.monotonic() < end:
            time.sleep(min(1.0, DEAD / 10))
            if _touched(self.path, number) != first:
                return True
        return False

    def _refusal(self, record: dict[str, Any] | None) -> ValueError:
        return ValueError(
            f"{self.path.parent} is in use: {describe(record)} trains there; "
            "wait for it, stop it or choose another folder"
        )

    def _is_ours(self) -> bool:
        number = self._file
        if number is None:
            return False
        return _is_at(number, self.path) and _read(number) == self._record

    def _live(self) -> None:
        stop = self._stop
        while not stop.wait(BEAT):
            number = self._file
            if number is not None:
                with contextlib.suppress(OSError):
                    os.utime(number)

    def _close(self) -> None:
        _open.pop(id(self), None)
        number, self._file = self._file, None
        if number is not None:
            os.close(number)


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
_open: weakref.WeakValueDictionary[int, RunLock] = weakref.WeakValueDictionary()


def _forget() -> None:
    """Drop the lock in a child process: a worker that outlives a killed run must not hold it."""
    for lock in list(_open.values()):
        lock._close()


os.register_at_fork(after_in_child=_forget)


def describe(record: dict[str, Any] | None) -> str:
    """The process in a record, in words."""
    record = record or {}
    who = f"process {record.get('pid', 'unknown')} on {record.get('host', 'an unknown machine')}"
    return f"{who}, since {record['since']}" if "since" in record else who


def _own_record() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(pid),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "token": secrets.token_hex(8),
    }


def _started(pid: Any) -> int | None:
    """When a process of this machine began, in ticks since boot, since numbers are reused."""
    stat = _text(f"/proc/{pid}/stat")
    # The second field, a name in brackets, may hold anything.
    return int(stat.rpartition(")")[2].split()[19]) if stat else None


def _text(path: str) -> str | None:
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _read(file: int | Path) -> dict[str, Any] | None:
    """The record in a lock file, None if it cannot be read."""
    try:
        content = os.pread(file, 65536, 0) if isinstance(file, int) else file.read_bytes()
        record = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except OSError:
        return False


def _touched(path: Path, number: int) -> tuple[int, bytes]:
    """A value that every sign of life changes. Opening the file bypasses the cache of NFS."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDONLY))
    return os.fstat(number).st_mtime_ns, os.pread(number, 65536, 0)
