"""`gankernels train`: train a GAN."""

from __future__ import annotations

import argparse
from typing import Any

from gankernels import games, train
from gankernels._options import describe
from gankernels.cli._common import PROGRAM, add_settings, complain, show, user_errors
from gankernels.data import ImageOptions, get_kind, kinds
from gankernels.train.config import parse_assignments


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "train",
        help="train a GAN",
        description="Train a GAN. The run folder gets config.json (reruns the run), metrics.jsonl, "
        "sample grids, samples.png and checkpoints. Ctrl-C finishes the step, saves and stops.",
    )
    parser.more_help = describe_settings
    parser.add_argument(
        "game", metavar="GAME", help="one of the games below, or a config.json to run again"
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="digits (scikit-learn's, the default), a folder with a subfolder of images per class, "
        "files of the MNIST or CIFAR families, an .npz, or a folder that holds one of these; "
        "kind:SOURCE chooses the kind of data if several fit",
    )
    parser.add_argument(
        "--steps", metavar="N", help="number of iterations, each a step of every player"
    )
    parser.add_argument("--batch-size", metavar="B", help="samples per step")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/GAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR bit for bit, or start one if there is none",
    )
    parser.add_argument("--precision", help="fp32, bf16 or fp16 (default: fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--no-graph",
        dest="graph",
        action="store_const",
        const=False,
        help="launch every kernel separately instead of replaying whole iterations as CUDA graphs: "
        "slower, with the same results",
    )
    discriminator = parser.add_argument_group(
        "remedies for an unstable game, in any game with a discriminator"
    )
    discriminator.add_argument(
        "--minibatch-discrimination",
        metavar="K,C",
        help="the discriminator compares the samples of a batch, by K kernels of dimension C "
        "(100,5 in the paper)",
    )
    discriminator.add_argument(
        "--minibatch-stddev",
        action="store_const",
        const=True,
        help="the discriminator sees the standard deviation over groups of 4 samples",
    )
    discriminator.add_argument(
        "--penalty",
        metavar="KIND",
        help="penalty on the discriminator's gradient: dragan, r1, r2, wgan-gp, wgan-lp or none",
    )
    discriminator.add_argument(
        "--penalty-weight",
        metavar="W",
        help="weight of the penalty, a mean over the batch (gamma / 2 for r1 and r2)",
    )
    discriminator.add_argument(
        "--penalty-every",
        metavar="N",
        help="lazy regularization: apply the penalty on every N-th step of the discriminator, "
        "scaled by N",
    )
    add_settings(parser, "any setting below; may be given several times")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit status."""
    # Every flag is a setting of the same name, except those that control how to start.
    flags = vars(args).keys() - {"command", "run", "game", "resume", "set"}
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    with user_errors(TypeError, ImportError):
        settings = given | parse_assignments(args.set)
        trainer = train.start(args.game, resume=args.resume, **settings)
    try:
        with user_errors():  # such as a full disk, or a damaged file that is read during training
            trainer.fit()
    except train.DivergenceError as error:
        complain(error)
        return 1
    if not trainer.ranks.first:
        return 0
    samples = trainer.run / f"samples{trainer.game.spec[trainer.game.makes].suffix}"
    show(f"{samples} shows samples at step {trainer.step}")
    if trainer.step < trainer.config.steps:
        again = f"{PROGRAM} train {trainer.game.name} --resume --out {trainer.run}"
        show(f"stopped early; continue with: {again}")
    return 0


def describe_settings() -> str:
    """The games and all settings of `--set`, for the end of `train --help`."""
    classes = {name: games.get(name) for name in games.names()}
    lines = ["games:"]
    for name, game in classes.items():
        lines.append(f"  {name:<16} {(game.__doc__ or name).splitlines()[0]}")
    lines += ["", "settings of every run (--set KEY=VALUE):"]
    lines += [_setting(*row) for row in describe(train.Config)]
    images = describe(ImageOptions)
    lines += ["", "settings of image data:", *(_setting(*row) for row in images)]
    for name in kinds():
        if rows := [row for row in describe(get_kind(name).Options) if row not in images]:
            lines += ["", f"settings of {name} data:", *(_setting(*row) for row in rows)]
    common = describe(games.AdversarialOptions)
    lines += ["", "settings of every game with a discriminator:"]
    lines += [_setting(*row) for row in common]
    for name, game in classes.items():
        own = {row[0]: row for row in describe(game.Options) if row not in common}
        for key, value in game.defaults.items():
            own[key] = (key, str(value), "(instead of the default above)")
        lines += ["", f"settings of {name}:", *(_setting(*row) for row in own.values())]
    return "\n".join(lines)


def _setting(name: str, default: str, help: str) -> str:
    return f"  {name + '=' + default:<30} {help}"
