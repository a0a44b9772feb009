"""`gankernels sample`: draw samples from a trained generator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from gankernels import train
from gankernels._devices import choose_device
from gankernels._files import is_stdout, require_disk
from gankernels._memory import require
from gankernels._paths import expand
from gankernels.cli._common import add_device, add_source, show, user_errors
from gankernels.data import Image
from gankernels.data._pictures import arrange, save_grid
from gankernels.games import Game
from gankernels.train import sample


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "sample",
        help="save samples: a grid, single files or an array",
        description="Draw samples from a trained generator. The same seed gives the same samples, "
        "however many are drawn and, but for rounding, on whatever device.",
    )
    add_source(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="where to write (default: samples.png, samples.npz, or the folder samples)",
    )
    parser.add_argument(
        "--format",
        choices=["grid", "png", "npz"],
        help="grid: one PNG of all; png: a folder with a PNG of each, in a subfolder per class "
        "where there are classes; npz: images and labels, the data's own, as --data takes them "
        "(default: npz where PATH ends in .npz, else grid)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="number of images (default: 64)")
    parser.add_argument(
        "--labels",
        metavar="NAMES",
        help="classes to draw in turn: cat,dog or, if no name is a number, their indices "
        "0,1 (default: all; conditional games only)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="noise seed (default: 0)")
    parser.add_argument(
        "--interpolate",
        metavar="A,B",
        help="every row walks from an image of seed A to one of seed B, with one label, by "
        "spherical interpolation of their noise: normal noise lies near a sphere",
    )
    parser.add_argument(
        "--columns",
        type=int,
        metavar="N",
        help="grid columns (default: chosen by count and labels; 10 with --interpolate)",
    )
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="keep every coordinate of the noise within [-T, T] by drawing from the truncated "
        "normal distribution (the truncation trick): 2, 1 and 0.5 give ever more typical images "
        "of ever less variety (default: the whole distribution, as in training)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        metavar="B",
        help="images computed at a time, which bounds memory (default: %(default)s)",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write samples, and return the exit status."""
    with user_errors(TypeError, ImportError):
        out, count = sample_run(args)
    if not is_stdout(out):
        show(f"{out}: {count} samples")
    return 0


def sample_run(args: argparse.Namespace) -> tuple[Path, int]:
    """Write samples; return where they are and how many."""
    for name in ("count", "columns", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    form, out = choose_format(args.format, args.out)
    game, _ = train.load_game(args.source, choose_device(args.device))
    if not isinstance(game.spec[game.makes], Image) or not game.latent_dim:
        raise ValueError(
            f"{args.source} must be of a game that makes images from noise, got {game.name}: "
            "use Game.sample instead"
        )
    labels = None
    if args.labels is not None:
        labels = sample.parse_labels(args.labels, game.spec.classes)
    elif game.conditional:
        labels = list(range(len(game.spec.classes)))

    if args.interpolate is None:
        count = args.count or 64
        check_room(game, count, args.columns or 1, form, out)
        chosen, columns = arrange(count, labels)
        columns = args.columns or columns
        noise = sample.draw(game, count, args.seed or 0, args.truncation)
    else:
        if args.seed is not None:
            raise ValueError("--seed cannot be combined with --interpolate")
        first, second = parse_numbers("--interpolate", args.interpolate, "1,2", length=2)
        columns = args.columns or 10
        count = args.count or columns * (len(labels) if labels else 8)
        if count % columns:
            raise ValueError(f"--count must be a multiple of the {columns} columns, got {count}")
        check_room(game, count, columns, form, out, walks=True)
        chosen, _ = arrange(count // columns, labels)
        chosen = None if chosen is None else chosen.repeat_interleave(columns)
        noise = sample.walk(game, count // columns, columns, (first, second), args.truncation)

    images = sample.generate(game, noise, chosen, min(args.batch_size, sample.BLOCK))
    if form == "grid":
        save_grid(torch.cat(list(images)), out, columns)
    elif form == "png":
        sample.save_folder(images, chosen, out, game.spec.classes, count)
    elif chosen is None:
        sample.save_npz(images, torch.zeros(count).long(), out)
    else:
        sample.save_npz(images, chosen, out, game.spec.classes)
    return out, count


def check_room(
    game: Game, count: int, columns: int, form: str, out: Path, walks: bool = False
) -> None:
    """Raises ValueError if the images do not fit into memory, or on the disk of `out`."""
    channels, height, width = game.spec.image_shape
    image, what = channels * height * width, f"--count {count}"
    needed = 8 * count  # the labels
    if form == "grid":  # all images, in parts and as a whole, and the picture
        needed += (2 * count + -(-count // columns) * columns) * image
    else:
        require_disk(count * (image if form == "npz" else 64), out, what)  # no PNG has less
    if walks:
        needed += count * game.latent_dim * 8
    require(needed, what if columns <= count else f"--columns {columns}")


def choose_format(form: str | None, out: str | None) -> tuple[str, Path]:
    """The format and the path to write. Raises ValueError if the path's suffix contradicts it."""
    is_npz = out is not None and out.endswith(".npz")
    if form is None:
        form = "npz" if is_npz else "grid"
    if out is None:
        out = {"grid": "samples.png", "png": "samples", "npz": "samples.npz"}[form]
    elif is_npz != (form == "npz"):
        raise ValueError(f"--out must end in .npz for npz only, got --format {form}, --out {out}")
    elif form == "png" and out.endswith(".png"):
        raise ValueError(f"--format png makes a folder, and grid one PNG: got --out {out}")
    return form, expand(out)


def parse_numbers(option: str, text: str, example: str, length: int | None = None) -> list[int]:
    """`"0,1,2"` as numbers. Raises ValueError for other text, or for another number of them."""
    try:
        numbers = [int(part) for part in text.split(",")]
        if length not in (None, len(numbers)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{option} must be numbers like {example}, got {text!r}") from None
    return numbers
