"""The command line: one module for every command, with `add` for its options and `run`.

Errors that the user can fix (UserError) print one line and end with status 2; a run that diverged
ends with status 1, an interruption with 130. Any other exception is a bug and keeps its traceback.
Results are saved before they are printed, and a closed pipe is not an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from gankernels._console import fill_descriptors, say, settle
from gankernels.cli import bench, evaluate, info, sample, train
from gankernels.cli._common import PROGRAM, Parser, UserError, complain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv`, `sys.argv[1:]` when None, and return the exit status."""
    fill_descriptors()
    try:
        return run(argv)
    except UserError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        say(f"{PROGRAM}: interrupted")
        return 130
    finally:
        settle()


def run(argv: Sequence[str] | None) -> int:
    """Run the command line as `main` does, with errors as exceptions."""
    parser = Parser(
        prog=PROGRAM,
        description="GANs on fused kernels that stay fast through the second derivative.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (train, sample, evaluate, bench, info):
        command.add(commands)
    args = parser.parse_args(argv)
    return int(args.run(args))
