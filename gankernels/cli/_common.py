"""Shared parts of the commands: errors of the user, output, and options."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from gankernels._console import say
from gankernels._memory import too_large
from gankernels.train import CheckpointError

PROGRAM = "gankernels"
#: Characters of a message: more than any message has, unless it quotes user input.
LONGEST = 1000


class UserError(Exception):
    """An error that the user can fix; its message is cut to one line of limited length.

    The text may quote anything, such as a whole file or a name with a line break.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:LONGEST])
        super().__init__(line + (" ..." if len(message) > LONGEST else ""))


@contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn errors that bad input raises into UserErrors, and errors of the types `more` as well."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, (ValueError, OSError, CheckpointError))
        message = None if ours else too_large(error)
        if message is None and not ours and not isinstance(error, more):
            raise
        raise UserError(message or str(error)) from error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors; its help may end with text computed on demand."""

    more_help: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        more = f"\n{self.more_help()}\n" if self.more_help else ""
        return super().format_help() + more

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message, end="", needed=True)


def show(text: str, end: str = "\n", needed: bool = False) -> None:
    """Write to stdout. A closed pipe is not an error: its reader has seen enough.

    Raises UserError if the stream fails and the output is `needed`, the command's only result.
    """
    error = say(text, "stdout", end, patient=needed)
    if needed and error is not None and error.errno not in (errno.EPIPE, errno.EBADF):
        raise UserError(f"stdout cannot be written to: {error.strerror}")


def complain(error: object) -> None:
    """Write an error to stderr."""
    say(f"{PROGRAM}: error: {error}")


def add_settings(parser: argparse.ArgumentParser, help: str) -> None:
    """The option `--set`, for `train.config.parse_assignments`."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The argument for a trained game."""
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder or a .pt file")


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """The option `--device` of commands without a configuration."""
    help = "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: %(default)s)"
    parser.add_argument("--device", default=default, help=help)
