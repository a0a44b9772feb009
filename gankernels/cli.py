"""The command line: one `add_<command>` and one `run_<command>` for every command.

Errors of the user's making (UserError) print one line and end with status 2; a run that diverged
ends with status 1. Whatever else is raised is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

PROGRAM = "gankernels"


class UserError(Exception):
    """Something that the user can put right; the message says what."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Inside, what bad input raises becomes a UserError."""
    from gankernels.train import CheckpointError

    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, CheckpointError) as error:
        raise UserError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, and whose help can go on with text made on demand."""

    more_help: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        more = f"\n{self.more_help()}\n" if self.more_help else ""
        return super().format_help() + more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv`, `sys.argv[1:]` when None, and return the exit status."""
    parser = Parser(
        prog=PROGRAM,
        description="GANs on fused kernels that stay fast through the second derivative.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train(commands)
    add_sample(commands)
    add_info(commands)
    try:
        args = parser.parse_args(argv)
        return args.run(args)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


def add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a GAN on images",
        description="Train a GAN. The run folder gets config.json (reruns the run), metrics.jsonl, "
        "sample grids, samples.png and checkpoints. Ctrl-C finishes the step, saves and stops.",
    )
    parser.more_help = describe_settings
    parser.add_argument(
        "model", metavar="MODEL", help="one of the models below, or a config.json to run again"
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="digits (scikit-learn's, the default), a folder with MNIST's IDX files, a folder "
        "with a subfolder of images per class, a CIFAR-10 archive, or an .npz",
    )
    parser.add_argument("--steps", metavar="N", help="iterations, each a step of every player")
    parser.add_argument("--batch-size", metavar="B", help="images per step")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/MODEL)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR bit for bit, or start it where there is none",
    )
    parser.add_argument("--precision", help="fp32 or bf16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting below; may be given several times",
    )
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    from gankernels import train
    from gankernels.train.config import parse_assignments

    flags = ("data", "steps", "batch_size", "out", "precision", "device")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    with user_errors():
        settings = given | parse_assignments(args.set)
        trainer = train.start(args.model, resume=args.resume, **settings)
    try:
        trainer.fit()
    except train.DivergenceError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except (train.CheckpointError, OSError) as error:  # a full disk, say
        raise UserError(str(error)) from error
    print(f"{trainer.run / 'samples.png'} shows samples at step {trainer.step}")
    if trainer.step < trainer.config.steps:
        print(f"stopped early; continue with: {PROGRAM} train {trainer.game.name} --resume", end="")
        print(f" --out {trainer.run}")
    return 0


def describe_settings() -> str:
    """The models and all that `--set` takes, for the end of `train --help`."""
    from gankernels import games
    from gankernels.train import Config
    from gankernels.train.config import describe

    classes = {name: games.get(name) for name in games.names()}
    lines = ["models:"]
    for name, game in classes.items():
        lines.append(f"  {name:<16} {game.__doc__.splitlines()[0]}")
    lines += ["", "settings of every run (--set KEY=VALUE):"]
    lines += [_setting(*row) for row in describe(Config)]
    for name, game in classes.items():
        rows = {row[0]: row for row in describe(game.Options)}
        for key, value in game.defaults.items():
            rows[key] = (key, str(value), "(instead of the default above)")
        lines += ["", f"settings of {name}:", *(_setting(*row) for row in rows.values())]
    return "\n".join(lines)


def _setting(name: str, default: str, help: str) -> str:
    return f"  {name + '=' + default:<28} {help}"


def add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="save a grid of samples",
        description="Draw samples from a trained generator and save them as one PNG.",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder or a .pt file")
    parser.add_argument(
        "--out", metavar="PNG", default="samples.png", help="(default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument(
        "--labels",
        help="classes to draw in turn, as indices: 0,1,2 (default: all; conditional models only)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.set_defaults(run=run_sample)


def run_sample(args: argparse.Namespace) -> int:
    import torch

    from gankernels import train
    from gankernels.train.images import arrange, save_grid

    with user_errors():
        if args.count < 1:
            raise ValueError(f"--count must be at least 1, got {args.count}")
        game, _ = train.load_game(args.source)
        labels = None
        if args.labels is not None:
            labels = parse_labels(args.labels)
        elif game.conditional:
            labels = list(range(game.num_classes))
        labels, columns = arrange(args.count, labels)
        rng = torch.Generator().manual_seed(args.seed)
        save_grid(game.sample(args.count, labels, rng), args.out, columns)
    print(f"{args.out}: {args.count} samples")
    return 0


def parse_labels(text: str) -> list[int]:
    """`"0,1,2"` as numbers. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels takes numbers like 0,1,2, got {text!r}") from None


def add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what was built, with what, and what is in use",
        description="Print what was built, for which processors, with what, and what is in use.",
    )
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    import gankernels

    print("\n".join(describe_build(gankernels.build_info())))
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
