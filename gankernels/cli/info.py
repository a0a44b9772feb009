"""`gankernels info`: print how the library was built and what is in use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from gankernels._library import build_info
from gankernels.cli._common import show


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "info",
        help="show how the library was built and what is active",
        description="Print how the library was built, for which processors, and what is active.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print facts of the build, and return the exit status."""
    show("\n".join(describe_build(build_info())), needed=True)
    return 0


def describe_build(info: dict[str, Any], indent: str = "") -> Iterator[str]:
    """`build_info()` as aligned lines, nested mappings indented."""
    width = max((len(str(key)) for key in info), default=0) + 2
    for key, value in info.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from describe_build(value, indent + "  ")
        elif isinstance(value, (list, tuple)):
            yield f"{indent}{key:<{width}}{', '.join(map(str, value)) or '-'}"
        else:
            yield f"{indent}{key:<{width}}{'-' if value is None else value}"
