"""How the scripts here time and save: with the clock of `gankernels bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import gankernels as gk
from gankernels.bench import timing
from gankernels.bench.timing import machine

RESULTS = Path(__file__).parent / "results"


def prepare(threads: int = 2) -> None:
    """Sets up the process so that kernels are compared, not page faults."""
    torch.set_num_threads(threads)
    gk.tune_allocator()


def arguments_of(description: str) -> argparse.Namespace:
    """The command line of a script without options of its own; prepares the process as it says."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2, help="per case")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    return arguments


def interleaved(
    contenders: dict[str, Callable[[], object]], *, seconds: float = 2.0, least: int = 7
) -> dict[str, float]:
    """Times the contenders in turn, round after round, and returns each one's median in seconds."""
    times = timing.interleaved(contenders, seconds=seconds, least=least)
    return {name: time.median for name, time in times.items()}


def save(name: str, rows: list[dict]) -> Path:
    """Writes results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
