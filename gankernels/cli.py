"""The command line: one `add_<command>` and one `run_<command>` for every command.

Errors of the user's making (UserError) print one line and end with status 2; a run that diverged
ends with status 1, an interruption with 130. Whatever else is raised is a defect and keeps its
traceback. What is told of is safe before, and a reader who has gone is no error.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gankernels._console import fill_descriptors, is_terminal, say, settle
from gankernels._paths import expand

PROGRAM = "gankernels"
#: Characters of a message: more than any of ours has, unless it quotes what it was given.
LONGEST = 1000


class UserError(Exception):
    """Something that the user can put right; the message says what, in one line of bearable length.

    What is quoted in it may be anything: the whole of a file, say, or a name with a line break.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message[:LONGEST])
        super().__init__(line + (" ..." if len(message) > LONGEST else ""))


@contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Inside, what bad input raises becomes a UserError, and so do errors of the types `more`."""
    from gankernels._memory import too_large
    from gankernels.train import CheckpointError

    try:
        yield
    except Exception as error:
        ours = isinstance(error, (ValueError, OSError, CheckpointError))
        message = None if ours else too_large(error)
        if message is None and not ours and not isinstance(error, more):
            raise
        raise UserError(message or str(error)) from error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, and whose help can go on with text made on demand."""

    more_help: Callable[[], str] | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        more = f"\n{self.more_help()}\n" if self.more_help else ""
        return super().format_help() + more

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message, end="", needed=True)


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
    """What `main` does, with errors as exceptions."""
    parser = Parser(
        prog=PROGRAM,
        description="GANs on fused kernels that stay fast through the second derivative.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_bench(commands)
    add_info(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def show(text: str, end: str = "\n", needed: bool = False) -> None:
    """Write to stdout. A reader who has gone has seen enough.

    Raises UserError where it is `needed`, being all that a command does, and the stream fails.
    """
    error = say(text, "stdout", end, patient=needed)
    if needed and error is not None and error.errno not in (errno.EPIPE, errno.EBADF):
        raise UserError(f"stdout cannot be written to: {error.strerror}")


def complain(error: object) -> None:
    say(f"{PROGRAM}: error: {error}")


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
        help="digits (scikit-learn's, the default), a folder with a subfolder of images per class, "
        "files of the MNIST or CIFAR families, an .npz, or a folder that holds one of these",
    )
    parser.add_argument("--steps", metavar="N", help="iterations, each a step of every player")
    parser.add_argument("--batch-size", metavar="B", help="images per step")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/MODEL)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR bit for bit, or start it where there is none",
    )
    parser.add_argument("--precision", help="fp32, bf16 or fp16 (default: fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--no-graph",
        dest="graph",
        action="store_const",
        const=False,
        help="on CUDA, launch every kernel by itself instead of replaying whole iterations as "
        "graphs: the same numbers, slower",
    )
    discriminator = parser.add_argument_group(
        "remedies for an unstable game, in any model with a discriminator"
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
        help="on the gradient of the discriminator: dragan, r1, r2, wgan-gp, wgan-lp or none",
    )
    discriminator.add_argument(
        "--penalty-weight",
        metavar="W",
        help="factor of the penalty, the mean over the batch (gamma / 2 for r1 and r2)",
    )
    discriminator.add_argument(
        "--penalty-every",
        metavar="N",
        help="lazy regularisation: the penalty counts on every N-th step of the discriminator "
        "only, and N-fold there",
    )
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

    # Every flag is a setting of the same name, except what says how to start.
    flags = vars(args).keys() - {"command", "run", "model", "resume", "set"}
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    with user_errors(TypeError, ImportError):
        settings = given | parse_assignments(args.set)
        trainer = train.start(args.model, resume=args.resume, **settings)
    try:
        with user_errors():  # a full disk, say, or a damaged file that is read while it trains
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
    common = describe(games.AdversarialOptions)
    lines += ["", "settings of every model with a discriminator:"]
    lines += [_setting(*row) for row in common]
    for name, game in classes.items():
        rows = {row[0]: row for row in describe(game.Options) if row not in common}
        for key, value in game.defaults.items():
            rows[key] = (key, str(value), "(instead of the default above)")
        lines += ["", f"settings of {name}:", *(_setting(*row) for row in rows.values())]
    return "\n".join(lines)


def _setting(name: str, default: str, help: str) -> str:
    return f"  {name + '=' + default:<30} {help}"


def add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="save samples: a grid, single files or an array",
        description="Draw samples from a trained generator. The same seed gives the same samples, "
        "however many are drawn and, but for rounding, on whatever device.",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder or a .pt file")
    parser.add_argument(
        "--out", metavar="PATH", help="(default: samples.png, samples.npz, or the folder samples)"
    )
    parser.add_argument(
        "--format",
        choices=["grid", "png", "npz"],
        help="grid: one PNG of all; png: a folder with a PNG of each, in a subfolder per class "
        "where there are classes; npz: images and labels, the data's own, as --data takes them "
        "(default: npz where PATH ends in .npz, else grid)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="images (default: 64)")
    parser.add_argument(
        "--labels",
        metavar="NAMES",
        help="classes to draw in turn: cat,dog or, where none is called by a number, their indices "
        "0,1 (default: all; conditional models only)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the noise (default: 0)")
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
        help="of the grid (default: as suits the count and the labels; 10 with --interpolate)",
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
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.set_defaults(run=run_sample)


def run_sample(args: argparse.Namespace) -> int:
    from gankernels._files import is_stdout

    with user_errors(TypeError, ImportError):
        out, count = sample_run(args)
    if not is_stdout(out):
        show(f"{out}: {count} samples")
    return 0


def sample_run(args: argparse.Namespace) -> tuple[Path, int]:
    """What `sample` does; returns where the samples are and how many."""
    import torch

    from gankernels import train
    from gankernels._devices import choose_device
    from gankernels.data.pictures import arrange, save_grid
    from gankernels.train import sample

    for name in ("count", "columns", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    form, out = choose_format(args.format, args.out)
    game, _ = train.load_game(args.source, choose_device(args.device))
    labels = None
    if args.labels is not None:
        labels = sample.parse_labels(args.labels, game.spec.classes)
    elif game.conditional:
        labels = list(range(len(game.spec.classes)))

    if args.interpolate is None:
        count = args.count or 64
        check_room(game, count, args.columns or 1, form, out)
        labels, columns = arrange(count, labels)
        columns = args.columns or columns
        noise = sample.draw(game, count, args.seed or 0, args.truncation)
    else:
        if args.seed is not None:
            raise ValueError("--seed and --interpolate both choose the noise: give one of them")
        seeds = parse_numbers("--interpolate", args.interpolate, "1,2", length=2)
        columns = args.columns or 10
        count = args.count or columns * (len(labels) if labels else 8)
        if count % columns:
            raise ValueError(f"--count must be a multiple of the {columns} columns, got {count}")
        check_room(game, count, columns, form, out, walks=True)
        labels, _ = arrange(count // columns, labels)
        labels = None if labels is None else labels.repeat_interleave(columns)
        noise = sample.walk(game, count // columns, columns, seeds, args.truncation)

    images = sample.generate(game, noise, labels, min(args.batch_size, sample.BLOCK))
    if form == "grid":
        save_grid(torch.cat(list(images)), out, columns)
    elif form == "png":
        sample.save_folder(images, labels, out, game.spec.classes, count)
    elif labels is None:
        sample.save_npz(images, torch.zeros(count).long(), out)
    else:
        sample.save_npz(images, labels, out, game.spec.classes)
    return out, count


def check_room(
    game: Any, count: int, columns: int, form: str, out: Path, walks: bool = False
) -> None:
    """Raises ValueError where so many images do not fit into memory, or onto the disk of `out`."""
    from gankernels._files import require_disk
    from gankernels._memory import require

    channels, height, width = game.spec.image_shape
    image, what = channels * height * width, f"--count {count}"
    needed = 8 * count  # the labels
    if form == "grid":  # all images, in parts and as a whole, and the picture
        needed += (2 * count + -(-count // columns) * columns) * image
    else:
        require_disk(count * (image if form == "npz" else 64), out, what)  # no PNG has less
    if walks:
        needed += count * game.options.latent_dim * 8
    require(needed, what if columns <= count else f"--columns {columns}")


def choose_format(form: str | None, out: str | None) -> tuple[str, Path]:
    """What `sample` writes, and where. Raises ValueError for a name that belies it."""
    is_npz = out is not None and out.endswith(".npz")
    if form is None:
        form = "npz" if is_npz else "grid"
    if out is None:
        out = {"grid": "samples.png", "png": "samples", "npz": "samples.npz"}[form]
    elif is_npz != (form == "npz"):
        raise ValueError(f"npz goes with names that end in .npz: --format {form}, --out {out}")
    elif form == "png" and out.endswith(".png"):
        raise ValueError(f"--format png makes a folder, and grid one PNG: got --out {out}")
    return form, expand(out)


def parse_numbers(option: str, text: str, example: str, length: int | None = None) -> list[int]:
    """`"0,1,2"` as numbers. Raises ValueError for anything else, or for another number of them."""
    try:
        numbers = [int(part) for part in text.split(",")]
        if length not in (None, len(numbers)):
            raise ValueError
    except ValueError:
        raise ValueError(f"{option} takes numbers like {example}, got {text!r}") from None
    return numbers


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score samples against real images",
        description="Score a trained generator with a classifier trained on the real images: "
        "whether samples are what they were asked to be, how diverse they are inside a class, and "
        "the Fréchet distance to the real images in the classifier's features, beside that of a "
        "generator with fresh weights. The classifier is trained once and kept in the run folder.",
    )
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder or a .pt file")
    parser.add_argument(
        "--data", metavar="SOURCE", help="real images, as for train (default: those of the run)"
    )
    parser.add_argument(
        "--features",
        choices=["classifier"],
        default="classifier",
        help="what images are compared in (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="samples (default: as many as real, at most 10,000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the scores to FILE as well")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    from gankernels._files import is_stdout, write_json

    with user_errors(TypeError, ImportError):
        scores = evaluate_run(args)
        try:
            if args.json is not None:
                write_json(expand(args.json), scores)
        finally:  # what took minutes to compute is shown, also where it cannot be written
            if args.json is None or not is_stdout(expand(args.json)):
                show("\n".join(describe_scores(scores)), needed=args.json is None)
    return 0


def evaluate_run(args: argparse.Namespace) -> dict[str, Any]:
    """All that `evaluate` prints, by name; shares are in [0, 1]."""
    from dataclasses import asdict

    import torch

    from gankernels import data, metrics, train
    from gankernels._devices import choose_device
    from gankernels._memory import require
    from gankernels.train import sample
    from gankernels.train.checkpoint import list_classes

    if args.count is not None:  # the features of every sample
        require(256 * args.count, f"--count {args.count}")
    sample.check_seed(args.seed)
    device = choose_device(args.device)
    checkpoint = train.latest_checkpoint(args.source)
    game, config = train.load_game(checkpoint, device)
    real = data.load(args.data or config["data"], size=game.spec.size, channels=game.spec.channels)
    if game.conditional and real.classes != game.spec.classes:
        raise ValueError(
            f"the model was trained on other classes than {real.name} has: "
            f"{list_classes(game.spec.classes, real.classes)} there, "
            f"{list_classes(real.classes, game.spec.classes)} here"
        )
    in_run_folder = checkpoint.parent.name == "checkpoints"
    classifier, _ = metrics.load_or_train_classifier(
        real,
        checkpoint.parent.parent if in_run_folder else checkpoint.parent,
        device=device,
        progress=is_terminal(),
    )
    real_features = metrics.features(classifier, real.images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        untrained = type(game)(game.spec, game.options).to(device).eval()

    def score(generator: Any) -> metrics.Scores:
        return metrics.evaluate(
            lambda labels, n, rng: generator.sample(n, rng=rng, labels=labels),
            real,
            classifier,
            n=args.count,
            conditional=game.conditional,
            seed=args.seed,
            real_features=real_features,
        )

    scores, untrained_frechet = score(game), score(untrained).frechet
    return {
        "model": game.name,
        "checkpoint": str(checkpoint),
        "data": real.name,
        "seed": args.seed,
        **asdict(scores),
        "untrained_frechet": untrained_frechet,
        "frechet_ratio": scores.frechet / untrained_frechet if untrained_frechet else None,
    }


def describe_scores(scores: dict[str, Any]) -> Iterator[str]:
    """The result of `evaluate_run` as lines for a terminal."""
    yield "{n} samples of {checkpoint} ({model}) against {data}".format(**scores)
    rows = [
        ("classifier's accuracy on held-out real images", "classifier_accuracy", "{:.2%}"),
        ("class-conditional accuracy of the samples", "accuracy", "{:.2%}"),
        ("within-class diversity relative to real", "diversity_ratio", "{:.1%}"),
        ("Fréchet distance (classifier features)", "frechet", "{:.3f}"),
        ("Fréchet distance of an untrained generator", "untrained_frechet", "{:.3f}"),
        ("ratio of the two", "frechet_ratio", "{:.4f}"),
    ]
    for label, name, form in rows:
        if scores[name] is not None:  # an unconditional game has no labels to obey
            yield f"  {label:<47}{form.format(scores[name])}"


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the kernels and whole training iterations against PyTorch's ops",
        description="Measure every op and some games side by side with the same in PyTorch's ops, "
        "print tables, and leave results.json, index.html and plots. Ctrl-C ends it after the case "
        "in hand, a second one at once; what was measured is written all the same.",
    )
    parser.add_argument(
        "--ops", nargs="*", metavar="NAME", help="ops to measure (default: all, without --train)"
    )
    parser.add_argument(
        "--train",
        nargs="*",
        metavar="MODEL",
        help="games to measure, on the digits (default: a few, without --ops)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the games of --train; may be given several times",
    )
    parser.add_argument(
        "--out", default="bench", metavar="DIR", help="for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small cases for a short time: less than a minute"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="torch.compile takes part in the ops: needs a C++ compiler, and minutes",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="per case (default: 1, or 0.2 with --quick)"
    )
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    with user_errors(TypeError, ImportError):
        from gankernels import bench
        from gankernels.train.config import parse_assignments

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
        out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows now
    from gankernels.train.signals import StopRequest

    with StopRequest() as stop, user_errors():
        results = bench.compare(plan, lambda: stop.requested)
        if not results.rows:
            raise UserError("stopped before anything was measured")
        try:  # before anything is told: its reader may have gone
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


def add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what was built, with what, and what is in use",
        description="Print what was built, for which processors, with what, and what is in use.",
    )
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    import gankernels

    show("\n".join(describe_build(gankernels.build_info())), needed=True)
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
