"""The command line of the benchmark scripts, and functions to time runs and save results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch

import gankernels as gk
from gankernels import bench
from gankernels.bench.timing import Run, machine

RESULTS = Path(__file__).parent / "results"


def prepare(threads: int = 2) -> None:
    """Sets the number of threads, and keeps page faults out of the comparison."""
    torch.set_num_threads(threads)
    gk.tune_allocator()


def arguments_of(description: str) -> argparse.Namespace:
    """Parses the options that most scripts have, and prepares the process."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2, help="seconds per case")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    return arguments


def medians(runs: Mapping[str, Run], *, seconds: float = 2.0, least: int = 7) -> dict[str, float]:
    """Returns the median time of each run in seconds, measured by `interleaved`."""
    times = bench.interleaved(runs, seconds=seconds, least=least)
    return {name: timing.median for name, timing in times.items()}


def save(name: str, rows: list[dict]) -> Path:
    """Writes results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
