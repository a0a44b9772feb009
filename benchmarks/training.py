"""Measures whole training runs, in iterations per second: PyTorch-GAN's scripts and the trainer.

``python benchmarks/training.py`` prints the table, ``--save training`` writes results/. For each of
PyTorch-GAN's cgan, dcgan and wgan_gp, batch 64, the contenders are

- ``script``: the script as its user runs it (pytorch_gan.py), with images decoded by Pillow;
- ``memory``: the same with decoded images in memory, so that only the training is compared;
- ``memory, malloc``: as ``memory``, with an allocator that keeps large blocks;
- ``fp32`` and ``bf16``: the same networks, losses and optimizer steps in gankernels' trainer; with
  ``--device cuda`` also without CUDA graphs.

An iteration is one batch, as the scripts count. That is a step of both networks, or for wgan_gp a
critic step and a fifth of a generator step: the trainer's iteration, five critic steps and one of
the generator, counts as five. Every contender has a separate process, and they run in turn, round
after round. ``keras cgan`` is the trainer's own ``cgan``, at batch 32.

``--quality`` trains all of them for equally many iterations, several seeds each, and compares the
Fréchet distances of their samples; runs that are already in results/ are not repeated.
``--profile MODEL`` shows how the trainer spends its time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_gan
import script
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gankernels as gk
from gankernels import games, metrics
from gankernels.data import ImageData, Spec, load
from gankernels.data._pixels import resize
from gankernels.games import Adversarial, Batch, Game, Player, Round
from gankernels.games.wgan_gp import WGANGP, WGANGPOptions
from gankernels.train import Config, Trainer

# ---- the same GANs as games --------------------------------------------------------------------


class SameFakes(Adversarial):
    """The generator steps first, then the discriminator on the same fakes, as in the scripts."""

    script: ClassVar[type[pytorch_gan.AlternatingScript]]

    def make_generator(self) -> nn.Module:
        return gk.fuse(self.script.make_generator(), cpu=True)

    def make_discriminator(self) -> nn.Module:
        return gk.fuse(self.script.make_discriminator(), cpu=True)

    def loss(self, output: Tensor, target: float) -> Tensor:
        raise NotImplementedError

    def players(self) -> list[Player]:
        adam = partial(gk.optim.Adam, lr=pytorch_gan.LR, betas=pytorch_gan.BETAS)
        return [
            self.generator_player(adam),
            self.discriminator_player(adam, shared=True),
        ]

    def make(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        labels = {name: self.random(name, batch.size, rng) for name in self.given}
        noise = self.noise(batch.size, rng)
        return {"images": self.generator(noise, *labels.values()), **labels}

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"adversarial": self.loss(round.fake, 1.0)}

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"real": self.loss(round.real, 1.0) / 2, "fake": self.loss(round.fake, 0.0) / 2}


class CGAN(SameFakes):
    script = pytorch_gan.CGAN
    given = ("labels",)

    def loss(self, output: Tensor, target: float) -> Tensor:
        return (output - target).square().mean()


class DCGAN(SameFakes):
    script = pytorch_gan.DCGAN
    channels_last = True

    def loss(self, output: Tensor, target: float) -> Tensor:
        # Cross entropy from logits, in which 1 - sigmoid(x) is sigmoid(-x).
        return F.softplus(-output if target else output).mean()


class DenseWGANGP(WGANGP):
    script = pytorch_gan.WGANGP

    def __init__(self, spec: Spec) -> None:
        lr, (beta1, beta2) = pytorch_gan.LR, pytorch_gan.BETAS
        super().__init__(spec, WGANGPOptions(lr=lr, d_lr=lr, beta1=beta1, beta2=beta2))

    def make_generator(self) -> nn.Module:
        return gk.fuse(self.script.make_generator(), cpu=True)

    def make_discriminator(self) -> nn.Module:
        return gk.fuse(self.script.make_discriminator(), cpu=True)


GAMES: dict[str, Callable[[Spec], Game]] = {
    "cgan": CGAN,
    "dcgan": DCGAN,
    "wgan_gp": DenseWGANGP,
    "keras cgan": games.get("cgan"),
}
SIZES = {name: script.size for name, script in pytorch_gan.SCRIPTS.items()} | {"keras cgan": 28}
BATCH_SIZES = dict.fromkeys(GAMES, pytorch_gan.BATCH) | {"keras cgan": 32}
#: Iterations as the scripts count them to one of the trainer's.
BATCHES = dict.fromkeys(GAMES, 1) | {"wgan_gp": pytorch_gan.N_CRITIC}

# ---- contenders --------------------------------------------------------------------------------

#: What glibc takes from the environment where `gk.tune_allocator` cannot be called.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
ENVIRONMENTS = defaultdict(dict, {"memory, malloc": MALLOC})
OURS = ("fp32", "bf16")
ON_CUDA = (*OURS, "fp32, no graph", "bf16, no graph")


def contenders_of(model: str, device: str) -> tuple[str, ...]:
    if device == "cpu":
        theirs, ours = ("script", "memory", "memory, malloc"), OURS
    else:
        theirs, ours = ("script", "memory"), ON_CUDA
    return (*theirs, *ours) if model in pytorch_gan.SCRIPTS else ours


class Run:
    """A training run of a contender: `run()` continues it and returns the number of iterations."""

    def __init__(
        self, model: str, contender: str, data: ImageData, seed: int = 0, device: str = "cpu"
    ) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.iterations = 1
        if contender in ON_CUDA:
            gk.tune_allocator()
            trainer = make_trainer(model, contender, data, seed, device)
            self.generator, self.step = trainer.game.generator, trainer.iterate
            self.iterations = BATCHES[model]
            return
        devnull = open(os.devnull, "w")  # noqa: SIM115 (for as long as the run is)
        script = pytorch_gan.SCRIPTS[model](print=partial(print, file=devnull), device=device)
        if contender == "script":
            batches = pytorch_gan.script_batches(data, script.size)
        else:
            batches = pytorch_gan.memory_batches(data, script.size, device)
        self.generator, self.step = script.generator, lambda: script.step(*next(batches))

    def __call__(self) -> int:
        self.step()
        return self.iterations


def make_trainer(
    model: str, contender: str, data: ImageData, seed: int = 0, device: str = "cpu"
) -> Trainer:
    """No moving average: the scripts have none."""
    precision, _, graph = contender.partition(", ")
    size = SIZES[model]
    images = ImageData(resize(data.images, size), data.labels, data.classes, data.name)
    game = GAMES[model](images.spec)
    batch_size = BATCH_SIZES[model]
    config = Config(
        batch_size=batch_size,
        seed=seed,
        device=device,
        precision=precision,
        graph=not graph,
        ema=0,
    )
    return Trainer(game, images, config)


def read_data(source: str | None, count: int) -> ImageData:
    """Loads real images, or by default makes blobs of MNIST's size."""
    if source is not None:
        return load(source, channels=1)
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 5, 5, generator=rng)
    images = F.interpolate(coarse, (28, 28), mode="bicubic").mul_(255).clamp_(0, 255).byte()
    labels = torch.randint(pytorch_gan.CLASSES, (count,), generator=rng)
    return ImageData(images, labels, tuple("0123456789"), "blobs")


# ---- processes ---------------------------------------------------------------------------------


class Worker:
    """A process that does jobs; each job and each result is a line of JSON."""

    def __init__(self, contender: str, options: dict[str, Any]) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
        }
        root = str(Path(__file__).resolve().parent.parent)
        paths = (environment.get("PYTHONPATH"), root)  # a wheel under test comes first
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps({"contender": contender, **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | ENVIRONMENTS[contender],
        )

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender's process ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextmanager
def workers(options: dict[str, dict[str, Any]]) -> Iterator[dict[str, Worker]]:
    """Starts a worker for each contender, one after the other."""
    started: dict[str, Worker] = {}
    try:
        for contender, own in options.items():
            started[contender] = Worker(contender, own)
            started[contender].answer()
        yield started
    finally:
        for worker in started.values():
            worker.close()


def work(job: dict[str, Any]) -> None:
    """Runs in a worker's process: warms up, then trains for the number of seconds of each job."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    data = read_data(job["data"], job["count"])
    run = Run(job["model"], job["contender"], data, job.get("seed", 0), job["device"])
    if "iterations" in job:
        print(json.dumps(score(run, job, data)), flush=True)
        return
    measure(run, job["warm_up"], least=3)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(run, json.loads(line))), flush=True)


def measure(run: Run, seconds: float, least: int = 1) -> float:
    """Iterations per second."""
    count, calls, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds or calls < least:
        count += run()
        calls += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


# ---- speed -------------------------------------------------------------------------------------

#: How many times the script's iterations per second there have to be; for keras cgan how many.
BARS = {
    ("cgan", "fp32"): 1.7, ("cgan", "bf16"): 3.5,
    ("dcgan", "fp32"): 2.2, ("dcgan", "bf16"): 6.0,
    ("wgan_gp", "fp32"): 1.7, ("wgan_gp", "bf16"): 3.5,
    ("keras cgan", "bf16"): 200.0,
}  # fmt: skip
BARS_ON_CUDA = {
    (model, precision): 3000.0 if model == "keras cgan" else 10.0
    for model in GAMES
    for precision in OURS
}


HEADER = f"{'model':10} {'contender':14} {'it/s':>8}  x script (bar)  x memory  x memory, malloc"


def compare_speed(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    print(HEADER)
    for model in arguments.models:
        names = contenders_of(model, arguments.device)
        options = worker_options(arguments, model) | {"warm_up": arguments.warm_up}
        with workers(dict.fromkeys(names, options)) as processes:
            rounds = [
                {name: process.ask(arguments.seconds) for name, process in processes.items()}
                for _ in range(arguments.rounds)
            ]
        for name in names:
            row = summarise(model, name, rounds, arguments.device)
            print(json.dumps({"row": row}) if arguments.json else describe(row), flush=True)
            rows.append(row)
    if arguments.save:
        print(script.save(arguments.save, rows))


def summarise(
    model: str, contender: str, rounds: list[dict[str, float]], device: str = "cpu"
) -> dict[str, Any]:
    """Returns medians over the rounds; a ratio is the median of the ratios of the rounds."""

    def times(other: str) -> float | None:
        if other not in rounds[0]:
            return None
        return statistics.median(speeds[contender] / speeds[other] for speeds in rounds)

    speed = statistics.median(speeds[contender] for speeds in rounds)
    bar = (BARS if device == "cpu" else BARS_ON_CUDA).get((model, contender))
    times_script = times("script")
    return {
        "model": model,
        "contender": contender,
        "device": device,
        "it_per_s": speed,
        "rounds": [speeds[contender] for speeds in rounds],
        "times_script": times_script,
        "times_memory": times("memory"),
        "times_memory_malloc": times("memory, malloc"),
        "bar": bar,
        "met": None if bar is None else bar <= (times_script or speed),
    }


def describe(row: dict[str, Any]) -> str:
    def number(value: float | None, width: int) -> str:
        return f"{'' if value is None else format(value, '.2f'):>{width}}"

    bar = "" if row["bar"] is None else f"({row['bar']:g}){' ' if row['met'] else '!'}"
    return (
        f"{row['model']:10} {row['contender']:14} {row['it_per_s']:8.2f}  "
        f"{number(row['times_script'], 8)} {bar:7} {number(row['times_memory'], 8)}  "
        f"{number(row['times_memory_malloc'], 8)}"
    ).rstrip()


def worker_options(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "threads": arguments.threads,
        "data": arguments.data,
        "count": arguments.count,
        "device": arguments.device,
    }


# ---- quality -----------------------------------------------------------------------------------

#: Iterations as the scripts count them, such that all the runs can be afforded.
ITERATIONS = {"cgan": 4000, "dcgan": 400, "wgan_gp": 4000}
QUALITY = ("memory", *OURS)


def compare_quality(arguments: argparse.Namespace) -> None:
    """Does the runs that results/ lacks, saves each row at once, and prints the table."""
    name = arguments.save or "training_quality"
    path = script.RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    models = [model for model in arguments.models if model in ITERATIONS]
    wanted = []
    for seed in range(arguments.seeds):  # outermost, so that a first comparison is there early
        for model in models:
            iterations = max(1, round(ITERATIONS[model] * arguments.scale))
            iterations = -(-iterations // BATCHES[model]) * BATCHES[model]
            for contender in QUALITY:
                key = {
                    "model": model,
                    "contender": contender,
                    "seed": seed,
                    "iterations": iterations,
                    "data": Path(arguments.data).name if arguments.data else "blobs",
                }
                wanted.append(key)
    for key in wanted:
        if any(key.items() <= row.items() for row in rows):
            continue
        options = worker_options(arguments, key["model"]) | {
            "seed": key["seed"],
            "iterations": key["iterations"],
            "cache": arguments.cache,
        }
        worker = Worker(key["contender"], options)
        try:
            row = key | worker.answer()
        finally:
            worker.close()
        rows.append(row)
        script.save(name, rows)
        print(
            f"{row['model']:8} {row['contender']:7} seed {row['seed']}: distance "
            f"{row['frechet']:8.3f} in {row['cpu_seconds']:.0f} s of CPU",
            flush=True,
        )
    chosen = [row for row in rows if any(key.items() <= row.items() for key in wanted)]
    print("\n".join(quality_table(chosen)))


def score(run: Run, job: dict[str, Any], data: ImageData) -> dict[str, float]:
    """Trains, then measures samples of the generator in evaluation mode."""
    start, count = time.process_time(), 0
    while count < job["iterations"]:
        count += run()
    seconds = time.process_time() - start
    size = SIZES[job["model"]]
    real = ImageData(resize(data.images, size), data.labels, data.classes, data.name)
    generator = run.generator.eval()
    conditional = getattr(pytorch_gan.SCRIPTS[job["model"]], "conditional", False)

    @torch.no_grad()
    def sample(n: int, *, rng: torch.Generator, labels: Tensor | None = None) -> Tensor:
        return generator(torch.randn(n, pytorch_gan.LATENT, generator=rng), labels)

    given = ("labels",) if conditional else ()
    chosen = metrics.suitable(real, "images", given)
    evaluation = metrics.Evaluation(chosen, real, metrics.Cache(Path(job["cache"])), given=given)
    scores = {k: v for found in evaluation.score(sample).values() for k, v in found.items()}
    return {
        "frechet": scores["frechet"],
        "accuracy": scores.get("accuracy"),
        "diversity_ratio": scores.get("diversity"),
        "cpu_seconds": seconds,
    }


def quality_table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns means, standard errors, and whether ours differs significantly from the baseline."""
    lines = [f"{'model':8} {'contender':9} {'runs':>4} {'distance':>9} {'+-':>7}  from memory's"]
    distances: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        distances[row["model"], row["contender"]].append(row["frechet"])
    for (model, contender), values in sorted(
        distances.items(), key=lambda item: (item[0][0], QUALITY.index(item[0][1]))
    ):
        mean, error = mean_and_error(values)
        line = f"{model:8} {contender:9} {len(values):4} {mean:9.3f} {error:7.3f}"
        if contender in OURS and (baseline := distances.get((model, "memory"))):
            other, other_error = mean_and_error(baseline)
            allowed = 2 * math.hypot(error, other_error)
            verdict = "the same" if abs(mean - other) <= allowed else "differs"
            verdict = "too few runs" if math.isnan(allowed) else verdict
            line += f"  {mean - other:+.3f}, 2 standard errors are {allowed:.3f}: {verdict}"
        lines.append(line)
    return lines


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), spread / len(values) ** 0.5


# ---- profile -----------------------------------------------------------------------------------

#: What an operator's own time counts as: the first group of which a word is part of its name.
GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "rmsprop", "_foreach"),
    "gankernels": ("gankernels::",),
    "convolution and GEMM": ("conv", "addmm", "aten::mm", "aten::linear", "mkldnn", "bmm"),
    "casts and copies": ("copy_", "aten::to", "contiguous", "clone", "aten::cat"),
    "random numbers": ("rand", "normal_", "bernoulli_", "native_dropout", "uniform_"),
    "upsampling": ("upsample",),
    "autograd and Python": ("autograd::", "Backward", "AccumulateGrad", "Optimizer."),
    "other elementwise": ("aten::",),
}


def group_of(operator: str) -> str:
    for group, words in GROUPS.items():
        if any(word in operator for word in words):
            return group
    return "autograd and Python"


def show_profile(arguments: argparse.Namespace) -> None:
    """Returns the shares of an iteration by self time of operators; the rest is Python."""
    model = arguments.profile
    data = read_data(arguments.data, arguments.count)
    for precision in OURS:
        run = Run(model, precision, data)
        measure(run, arguments.warm_up, least=3)
        undisturbed = 1 / measure(run, arguments.seconds)
        start = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            count = 0
            while time.perf_counter() - start < arguments.seconds:
                count += run()
            wall = time.perf_counter() - start
        operators = {
            event.key: (event.self_cpu_time_total * 1e-6 / count, event.count / count)
            for event in profiler.key_averages()
        }
        groups = dict.fromkeys(GROUPS, 0.0)
        for operator, (seconds, _) in operators.items():
            groups[group_of(operator)] += seconds
        groups["autograd and Python"] += wall / count - sum(groups.values())
        calls = sum(calls for _, calls in operators.values())
        print(
            f"{model}, {precision}: {1e3 * undisturbed:.3f} ms an iteration, "
            f"{1e3 * wall / count:.3f} with the profiler, {calls:.0f} calls"
        )
        for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
            print(f"  {group:22} {1e3 * seconds:8.3f} ms {100 * seconds * count / wall:5.1f} %")
            own = [(s, n, o) for o, (s, n) in operators.items() if group_of(o) == group]
            for s, n, operator in sorted(own, reverse=True)[: arguments.operators]:
                print(f"    {operator[:52]:52} {1e3 * s:8.3f} ms {n:7.1f} calls")


# ---- command line ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default=",".join(GAMES),
        help="names, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", help="device of the speed and quality runs: cpu or cuda"
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help="data set for gankernels.data.load (default: blobs)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="number of threads; 0 is PyTorch's default"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="seconds per contender and round")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds of warm-up per contender")
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    parser.add_argument("--json", action="store_true", help="also print each row as a line of JSON")
    parser.add_argument(
        "--profile", metavar="MODEL", choices=GAMES, help="show how the trainer spends its time"
    )
    parser.add_argument(
        "--operators",
        type=int,
        default=4,
        help="number of operators that a profile lists per group",
    )
    parser.add_argument(
        "--quality", action="store_true", help="compare the quality of samples instead of speed"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds for --quality")
    parser.add_argument(
        "--scale", type=float, default=1, help="factor on the number of iterations of --quality"
    )
    parser.add_argument(
        "--cache",
        default=str(Path(tempfile.gettempdir()) / "gankernels-classifiers"),
        help="folder for the classifiers of --quality",
    )
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    arguments.models = arguments.models.split(",")
    for model in arguments.models:
        if model not in GAMES:
            parser.error(f"--models takes some of {', '.join(GAMES)}, got {model!r}")
    arguments.count = 10_000
    if arguments.quick:
        arguments.count, arguments.rounds = 200, 1
        arguments.seconds = arguments.warm_up = 0.05
        arguments.seeds, arguments.scale = 1, 0.001
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.profile:
        show_profile(arguments)
    elif arguments.quality:
        compare_quality(arguments)
    else:
        compare_speed(arguments)


if __name__ == "__main__":
    main()
