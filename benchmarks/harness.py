"""How everything here is timed: side by side in one process, interleaved, medians."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gankernels as gk

RESULTS = Path(__file__).parent / "results"


def prepare(threads: int = 2) -> None:
    """Sets up the process so that kernels are compared, not page faults."""
    torch.set_num_threads(threads)
    gk.tune_allocator()


def interleaved(
    contenders: dict[str, Callable[[], object]], *, seconds: float = 2.0, least: int = 7
) -> dict[str, float]:
    """Times the contenders in turn, round after round, and returns each one's median in seconds.

    Interleaving lets a machine's slow moments fall on all of them alike, so that the ratios hold
    where the times do not.
    """
    for run in contenders.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict:
    """What the figures were measured on."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "capability": gk.build_info()["cpu_capability"],
        "torch": torch.__version__,
        "gankernels": gk.__version__,
        "date": datetime.date.today().isoformat(),
    }


def save(name: str, rows: list[dict]) -> Path:
    """Writes results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
