"""Output to stdout and stderr that never fails, whether or not it is read.

The reader may be gone (`| head`), may have stopped reading (a terminal on hold) or may accept only
ASCII; the stream may be on a full disk or closed from the start. In all of these cases work
continues.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import warnings
from typing import Any

#: Seconds to wait for a reader; after that, output is dropped until it reads again.
PATIENCE = 1.0

_stuck: set[int] = set()


def say(
    text: str, stream: str = "stderr", end: str = "\n", patient: bool = False
) -> OSError | None:
    """Write a line to "stdout" or "stderr"; return an OSError instead of raising it.

    Characters that the stream's encoding lacks are escaped. A `patient` line waits for its reader.
    """
    file = getattr(sys, stream)
    if file is None:  # closed when Python started
        return OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        if not patient and not _takes(file):
            return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        encoding = getattr(file, "encoding", None) or "utf-8"
        file.write((text + end).encode(encoding, "backslashreplace").decode(encoding))
        file.flush()
    except OSError as error:
        return error
    except ValueError as error:  # closed by other code
        return OSError(errno.EBADF, str(error))
    return None


def warn(message: str) -> None:
    """Issue a RuntimeWarning; under a filter that raises, print it instead."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        say(f"warning: {message}")


class Terminal:
    """stderr for a progress bar, which never raises either."""

    encoding = property(lambda self: getattr(sys.stderr, "encoding", None))

    def write(self, text: str) -> None:
        say(text, end="")

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return is_terminal()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def is_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, or closed
        return False


def bar(**options: Any) -> Any:
    """tqdm's bar on stderr, or None if there is no terminal or tqdm does not work."""
    if not is_terminal():
        return None
    try:
        from tqdm import tqdm

        return tqdm(file=Terminal(), dynamic_ncols=True, **options)
    except Exception as error:
        warn(f"there is no progress bar, since tqdm cannot be used: {describe(error)}")
        return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def fill_descriptors() -> None:
    """Open the null device for every standard stream that was closed.

    Otherwise the next file that is opened, such as a checkpoint, would get its descriptor, and
    output of libraries would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor


def settle() -> None:
    """Drop unwritten output, which Python would try to write again at exit, and fail."""
    for file in (sys.stdout, sys.stderr):
        try:
            if file is not None:
                file.flush()
        except (OSError, ValueError):
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, file.fileno())
                os.close(null)
                file.flush()
            except (OSError, ValueError):
                pass


def _takes(file: Any) -> bool:
    """Whether a file accepts a line now, or after a while."""
    try:
        number = file.fileno()
    except (AttributeError, OSError, ValueError):
        return True  # not a file of the operating system
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    ready = bool(poll.poll(0 if number in _stuck else 1000 * PATIENCE))
    (_stuck.discard if ready else _stuck.add)(number)
    return ready
