"""`gankernels bench`: measure ops and games against PyTorch."""

from __future__ import annotations

import argparse
from typing import Any

from gankernels import bench
from gankernels._paths import expand
from gankernels.cli._common import UserError, add_device, add_settings, complain, show, user_errors
from gankernels.train.config import parse_assignments
from gankernels.train.signals import StopRequest


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "bench",
        help="compare the kernels and whole training iterations with PyTorch's ops",
        description="Measure every op and some games against the same in PyTorch's ops, "
        "print tables, and write results.json, index.html and plots. Ctrl-C stops after the "
        "current case, a second Ctrl-C at once; all measurements so far are written.",
    )
    parser.add_argument(
        "--ops", nargs="*", metavar="NAME", help="ops to measure (default: all, unless --train)"
    )
    parser.add_argument(
        "--train",
        nargs="*",
        metavar="GAME",
        help="games to measure, on the digits (default: a few, unless --ops)",
    )
    add_settings(parser, "a setting of the games of --train; may be given several times")
    parser.add_argument(
        "--out", default="bench", metavar="DIR", help="folder for results (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small cases for a short time: less than a minute"
    )
    add_device(parser, default="cpu")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also measure torch.compile (needs a C++ compiler; takes minutes)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="time per case (default: 1, or 0.2 with --quick)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and return the exit status."""
    with user_errors(TypeError, ImportError):
        plan = bench.plan(
            args.ops,
            args.train,
            settings=parse_assignments(args.set),
            device=args.device,
            compiled=args.compiled,
            quick=args.quick,
            seconds=args.seconds,
        )
        out = expand(args.out)
        out.mkdir(parents=True, exist_ok=True)  # fails early if it cannot be written to
    with StopRequest() as stop, user_errors():
        results = bench.compare(plan, lambda: stop.requested)
        if not results.rows:
            raise UserError("stopped before anything was measured")
        try:  # before anything is printed: the pipe's reader may be gone
            with user_errors():  # a full disk, say
                page = bench.write(results, out)
        finally:
            show("\n".join(bench.describe(results)))
    early = f"stopped early, after {len(results.rows)} of {results.planned} cases\n"
    told = f"{page} shows it, " if page is not None else ""
    told += f"{out / 'results.json'} has all figures; {results.took:.0f} s"
    show(f"\n{'' if results.complete else early}{told}")
    for row in results.failed:
        complain(f"{row.case}: {row.errors['ours']}")
    return 1 if results.failed else 0
