"""Timing: all contenders in one process, interleaved, with medians."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import gankernels as gk

Run = Callable[[], object]

#: Calls that one sample of the clock takes in at most.
MOST_CALLS = 100


class Timing(NamedTuple):
    """Seconds per call: the median, the quartiles on either side of it, and the least."""

    median: float
    low: float
    high: float
    least: float
    rounds: int
    calls: int  # in a row, which a round's time is the mean of

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

    Interleaving lets a machine's slow moments fall on all of them alike, so that the ratios hold
    where the times do not.

    Args:
        contenders: by name; each is called twice beforehand, untimed.
        seconds: until then new rounds begin.
        least: rounds there are at least,
        most: but none, after the first, begins later than so many seconds.
        span: a contender is called so often in a row, at most MOST_CALLS times, that a round takes
            this long: else what another one leaves in the caches decides on a short call. Zero for
            one call.
        wait: called before the clock is read; waits for a device that works on its own.
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
    """The argument `wait` of `interleaved` for this device."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def machine() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
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
    """The ceilings of a roofline: bytes and operations per second, of the fastest round.

    `memory` and `cache` are copies, read and written, of a tensor beyond all caches and of one
    within a core's. `operations` is what the faster of a matrix product and a convolution reaches
    in float32, a multiplication and an addition counted as two.
    """

    def fastest(run: Run, seconds: float) -> float:
        options = {"seconds": seconds, "least": 3, "span": 1e-3, "wait": waiting(device)}
        return interleaved({"": run}, **options)[""].least

    rates = {}
    for name, elements, seconds in (("memory", 1 << 26, 0.5), ("cache", 1 << 16, 0.1)):
        x = torch.ones(elements, device=device)
        y = torch.empty_like(x)
        rates[name] = 2 * x.nbytes / fastest(lambda y=y, x=x: y.copy_(x), seconds)
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
