"""Plans and runs a benchmark."""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gankernels as gk
from gankernels import _console as console
from gankernels._devices import choose_device
from gankernels._html import import_matplotlib
from gankernels._library import why_not
from gankernels._threads import available, bound_threads
from gankernels.bench import ops, timing, training
from gankernels.bench.ops import OPS, Case
from gankernels.bench.results import OpRow, Results, Row, TrainingRow
from gankernels.bench.timing import Run, Timing, interleaved
from gankernels.bench.training import Training


@dataclass(frozen=True)
class Plan:
    """What to measure, how, and on which device; `plan` makes one."""

    cases: tuple[Case, ...]
    trainings: tuple[Training, ...]
    device: torch.device
    compiled: bool = False
    quick: bool = False
    seconds: float = 1.0  # per case of an op; a game gets several times as much

    def __len__(self) -> int:
        return len(self.cases) + len(self.trainings)


def plan(
    op_names: Sequence[str] | None = None,
    games: Sequence[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    compiled: bool = False,
    quick: bool = False,
    seconds: float | None = None,
) -> Plan:
    """Plans a benchmark, and checks that it can run.

    Args:
        op_names: keys of `OPS`; an empty sequence means all. By default all ops are measured,
            unless `games` is given: then none is.
        games: names of games; an empty sequence means a few of them. By default these few games
            are measured, unless `op_names` is given: then none is.
        settings: the settings of `games`, as `gankernels train --set` takes them.
        device: the device to measure: cpu, cuda, cuda:1, ...
        compiled: whether to measure the ops with torch.compile too.
        quick: whether to measure fewer and smaller cases for a shorter time.
        seconds: the time per case; the default is 1, or 0.2 if quick.

    Raises:
        ValueError: an unknown op, game or setting, a device that cannot be used, or a device
            without kernels.
        ImportError: matplotlib or a package that the games' data need is missing.
    """
    import_matplotlib()
    if seconds is None:
        seconds = 0.2 if quick else 1.0
    if not seconds >= 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    if seconds == math.inf:
        raise ValueError("seconds must be finite, got inf")
    if settings and not games:
        raise ValueError("--set applies to games; name at least one with --train")
    for name in op_names or ():
        if name not in OPS:
            close = difflib.get_close_matches(name, OPS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown op {name!r}{hint} Available: {', '.join(OPS)}")
    if op_names is None and games is None:
        op_names = games = ()
    cases: list[Case] = []
    if op_names is not None:
        cases = [c for c in ops.cases(quick) if not op_names or c.op in op_names]
    trainings: list[Training] = []
    if games is not None:
        trainings = [Training(game, settings or {}) for game in games]
        trainings = trainings or training.trainings(quick)
    where = choose_device(device)
    if reason := why_not(where.type):
        raise ValueError(f"no gankernels kernels are available on {where}: {reason}")
    for wanted in trainings:
        training.make_trainer(wanted, str(where))
    return Plan(tuple(cases), tuple(trainings), where, compiled, quick, seconds)


@bound_threads()
def compare(plan: Plan, stop: Callable[[], bool] = lambda: False) -> Results:
    """Runs a plan, and reports progress on stderr.

    Ctrl-C ends it early, and so does `stop`, which is called between two cases; the results then
    cover the cases so far. If a contender fails, for example because memory runs out, its error
    is recorded instead of a time.
    """
    gk.tune_allocator()
    began = time.perf_counter()
    results = Results(environment(plan.device), len(plan), plan.quick)
    with progress(len(plan)) as report:
        try:
            if plan.cases:
                results.ceilings = timing.ceilings(plan.device)
            cases: tuple[Case | Training, ...] = (*plan.cases, *plan.trainings)
            for case in cases:
                if stop():
                    break
                report(case)
                results.rows.append(measure(case, plan))
                report(case, results.rows[-1])
        except KeyboardInterrupt:
            pass
    results.took = time.perf_counter() - began
    return results


def environment(device: torch.device) -> dict[str, Any]:
    """Describes the machine, the device, and the load of the processors before the benchmark."""
    known = {"device": str(device), "processors": available(), "load": os.getloadavg()[0]}
    if device.type == "cuda":
        known |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return known | timing.machine()


def measure(case: Case | Training, plan: Plan) -> Row:
    """Times the contenders of one case, interleaved."""
    if isinstance(case, Case):
        runs = ops.contenders(case, plan.device, compiled=plan.compiled)
        timings, errors = _time(runs, plan, plan.seconds, span=1e-3)
        return OpRow(case, timings, errors)
    runs = training.contenders(case, str(plan.device))
    timings, errors = _time(runs, plan, (15 if plan.quick else 10) * plan.seconds, span=0.05)
    return TrainingRow(case, timings, errors)


def _time(
    runs: Mapping[str, Run], plan: Plan, seconds: float, span: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Returns the times of the contenders that run, and the errors of the others."""
    wait = timing.waiting(plan.device)
    able, errors = running(runs, wait)
    # The limit keeps a quick run quick on a busy machine too.
    least, most = (3, 2 * seconds) if plan.quick else (5, math.inf)
    times = interleaved(able, seconds=seconds, least=least, most=most, span=span, wait=wait)
    return times, errors


def running(
    runs: Mapping[str, Run], wait: Callable[[], None]
) -> tuple[dict[str, Run], dict[str, str]]:
    """Returns the contenders that run, and the first line of the others' errors."""
    able, errors = {}, {}
    for name, run in runs.items():
        try:
            run()
            wait()
            able[name] = run
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            errors[name] = f"{type(error).__name__}: {lines[0]}"
    return able, errors


class progress:  # noqa: N801  (reads as a function)
    """Shows progress on stderr: a bar on a terminal if tqdm is installed, else a line per case."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar = console.bar(total=total, unit="case", leave=False)

    def __enter__(self) -> Callable[..., None]:
        return self.report

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, case: Case | Training, row: Row | None = None) -> None:
        """Call before a case, and after it with its row."""
        self.done += row is not None
        if self.bar is not None:
            self.bar.set_postfix_str(str(case))
            self.bar.update(row is not None)
        elif row is not None:
            parts = [f"{row.ratio(name):.2f}x {name}" for name in row.baselines if row.ratio(name)]
            parts += [f"{name} failed: {why}" for name, why in row.errors.items()]
            console.say(f"[{self.done}/{self.total}] {case}: {', '.join(parts)}")
