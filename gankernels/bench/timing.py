"""Timing: all contenders in one process, interleaved, with medians."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import gankernels as gk

Run = Callable[[], object]

#: The most calls that one sample of the clock covers.
MOST_CALLS = 100


class Timing(NamedTuple):
    """Seconds per call: the median, the quartiles on either side of it, and the least."""

    median: float
    low: float
    high: float
    least: float
    rounds: int
    calls: int  # in a row per round; the time of a round is their mean

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.high - self.low) / self.median


def interleaved(
    contenders: Mapping[str, Run],
    *,
    seconds: float = 2.0,
    least: int = 7,
    most: float = math.inf,
    span: float = 0.0,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Times the contenders in turn, round after round.

    Interleaving spreads a slow moment of the machine over all contenders, so that the ratios are
    reliable even if the times are not.

    Args:
        contenders: by name; each is called twice beforehand, untimed.
        seconds: new rounds begin until this much time has passed.
        least: the least number of rounds.
        most: the time, in seconds, after which no round but the first begins, even if there were
            fewer than `least`.
        span: the time, in seconds, for which a contender is called in a row in each round, at most
            MOST_CALLS times. Otherwise the contents of the caches, which other contenders change,
            would determine the time of a short call. Zero for one call.
        wait: called before the clock is read, to wait for an asynchronous device.
    """

    def sample(run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, run in contenders.items():
        sample(run, 1)
        calls[name] = max(1, min(MOST_CALLS, int(span / sample(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begin, rounds = time.perf_counter(), 0

    def goes_on() -> bool:
        spent = time.perf_counter() - begin
        return rounds == 0 or spent < seconds or (rounds < least and spent <= most)

    while goes_on():
        for name, run in contenders.items():
            times[name].append(sample(run, calls[name]))
        rounds += 1
    return {name: _timing(values, calls[name]) for name, values in times.items()}


def _timing(times: list[float], calls: int) -> Timing:
    low, high = min(times), max(times)
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), low, high, min(times), len(times), calls)


def waiting(device: torch.device | str) -> Callable[[], None]:
    """Returns the argument `wait` of `interleaved` for this device."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def machine() -> dict[str, Any]:
    """Describes the machine, and the versions of the software that affects the figures."""
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


def ceilings(device: torch.device | str) -> dict[str, float]:
    """Measures the ceilings of a roofline, in bytes and operations per second.

    `memory` and `cache` are the bandwidths of copying, reads plus writes, a tensor larger than all
    caches and one that fits in a core's cache. `operations` is the rate of the faster of a matrix
    product and a convolution in float32; a multiply-add counts as two operations.
    """

    def fastest(run: Run, seconds: float) -> float:
        timings = interleaved({"": run}, seconds=seconds, least=3, span=1e-3, wait=waiting(device))
        return timings[""].least

    rates = {}
    for name, elements, seconds in (("memory", 1 << 26, 0.5), ("cache", 1 << 16, 0.1)):
        x = torch.ones(elements, device=device)
        y = torch.empty_like(x)
        rates[name] = 2 * x.nbytes / fastest(partial(y.copy_, x), seconds)
    n = 1024
    matrix = torch.ones(n, n, device=device)
    images = torch.ones(16, 256, 16, 16, device=device)
    weight = torch.ones(256, 256, 3, 3, device=device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        times = (
            fastest(lambda: matrix @ matrix, 0.2) / n**3,
            fastest(lambda: F.conv2d(images, weight, padding=1), 0.2)
            / (images.numel() * weight[0].numel()),
        )
    rates["operations"] = 2 / min(times)
    return rates
