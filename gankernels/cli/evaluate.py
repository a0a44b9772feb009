"""`gankernels evaluate`: score the samples of a trained game."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from gankernels import data, metrics, train
from gankernels._console import is_terminal
from gankernels._devices import choose_device
from gankernels._files import is_stdout, write_json
from gankernels._memory import require
from gankernels._options import fill
from gankernels._paths import expand
from gankernels.cli._common import add_device, add_source, show, user_errors
from gankernels.data import Data
from gankernels.games import Game
from gankernels.train import sample
from gankernels.train.checkpoint import list_classes


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="score samples against real data",
        description="Score the samples of a trained game against real data. The metrics of images "
        "judge by a classifier that is trained on the real images once and kept in the run folder: "
        "whether samples are of the classes that they were made for, how diverse they are inside a "
        "class, and the Fréchet distance to the real images in the classifier's features, next to "
        "that of a generator with fresh weights.",
    )
    add_source(parser)
    parser.add_argument(
        "--data", metavar="SOURCE", help="real data, as for train (default: those of the run)"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"one or more of {','.join(metrics.names())} (default: all that fit the game)",
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="number of samples (default: as many as real ones, at most 10,000)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the samples (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the scores to FILE as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the scores, and return the exit status."""
    with user_errors(TypeError, ImportError):
        result, lines = evaluate(args)
        try:
            if args.json is not None:
                write_json(expand(args.json), result)
        finally:  # show scores that took minutes even if the file cannot be written
            if args.json is None or not is_stdout(expand(args.json)):
                show("\n".join(lines), needed=args.json is None)
    return 0


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The results by name, for JSON, and as lines for a terminal; shares are in [0, 1]."""
    if args.count is not None:
        require(256 * args.count, f"--count {args.count}")
    sample.check_seed(args.seed)
    chosen = None if args.metrics is None else metrics.parse(args.metrics)
    device = choose_device(args.device)
    checkpoint = train.latest_checkpoint(args.source)
    game, config = train.load_game(checkpoint, device)
    real = _real_data(game, config, args.data)
    if chosen is None:
        chosen = metrics.suitable(real, game.makes, game.given)
        if not chosen:
            raise ValueError(
                f"{game.name} must make samples that a metric can judge, "
                f"got {type(real.spec[game.makes]).__name__} from {real.name}"
            )
    in_run_folder = checkpoint.parent.name == "checkpoints"
    folder = checkpoint.parent.parent if in_run_folder else checkpoint.parent
    cache = metrics.Cache(folder, device, progress=is_terminal())
    evaluation = metrics.Evaluation(chosen, real, cache, game.makes, game.given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        untrained = type(game)(game.spec, game.options).to(device).eval()

    n = evaluation.count(args.count)
    scores = _flat(evaluation.score(game.sample, n=n, seed=args.seed))
    if relative := [m for m in chosen if metrics.get(m).relative]:
        reference = metrics.Evaluation(relative, real, cache, game.makes, game.given)
        for name, value in _flat(reference.score(untrained.sample, n=n, seed=args.seed)).items():
            scores[f"untrained_{name}"] = value
            if value:
                scores[f"{name}_ratio"] = scores[name] / value
    result = {
        "game": game.name,
        "checkpoint": str(checkpoint),
        "data": real.name,
        "seed": args.seed,
        "n": n,
        **evaluation.facts,
        **scores,
    }
    return result, list(_lines(result, evaluation))


def _real_data(game: Game, config: dict[str, Any], source: str | None) -> Data:
    """The data to compare with, opened with those settings of the run that their kind has.

    Raises ValueError if they do not have the fields that the game was built for.
    """
    source = source or config["data"]
    settings = fill(data.kind_of(source).Options, config).settled(game.spec).in_memory()
    real = data.load(source, **vars(settings))
    if game.conditional and real.spec.classes != game.spec.classes:
        raise ValueError(
            f"the game was trained on other classes than {real.name} has: "
            f"{list_classes(game.spec.classes, real.spec.classes)} there, "
            f"{list_classes(real.spec.classes, game.spec.classes)} here"
        )
    game.check(real.spec)
    return real


def _flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    return {key: value for found in scores.values() for key, value in found.items()}


def _lines(result: dict[str, Any], evaluation: metrics.Evaluation) -> Iterator[str]:
    yield "{n} samples of {checkpoint} ({game}) against {data}".format(**result)
    labels = {k: v for m in evaluation.metrics.values() for k, v in m.labels.items()}
    plain = {key: (key.replace("_", " "), "{:.4g}") for key in evaluation.facts}
    shown = [*labels, *(key for key in plain if key not in labels)]
    for key in shown:
        if key in result:
            label, form = labels.get(key) or plain[key]
            yield f"  {label:<47}{form.format(result[key])}"
