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
from gankernels.bench.results import Results, Row
from gankernels.bench.timing import Run, interleaved
from gankernels.bench.training import Training


@dataclass(frozen=True)
class Plan:
    """What to measure, how and where; `plan` makes one."""

    cases: tuple[Case, ...]
    trainings: tuple[Training, ...]
    device: torch.device
    compiled: bool = False
    quick: bool = False
    seconds: float = 1.0  # per case; of a training, a few times as many

    def __len__(self) -> int:
        return len(self.cases) + len(self.trainings)


def plan(
    op_names: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    device: str = "cpu",
    compiled: bool = False,
    quick: bool = False,
    seconds: float | None = None,
) -> Plan:
    """Plans a benchmark, and checks that it can run.

    Args:
        op_names: keys of `OPS`; an empty sequence for all. None leaves the ops out where `models`
            is given, else takes all.
        models: names of games; likewise.
        settings: of the games that `models` names, as `gankernels train --set` takes them.
        device: cpu, cuda, cuda:1, ...
        compiled: whether torch.compile takes part in the ops' cases.
        quick: fewer, smaller and shorter cases.
        seconds: per case; 1, or 0.2 when quick.

    Raises:
        ValueError: an unknown op, model or setting, a device that cannot be used, or none of our
            kernels for it.
        ImportError: matplotlib, or what the games' data need, is missing.
    """
    import_matplotlib()
    if seconds is None:
        seconds = 0.2 if quick else 1.0
    if not seconds >= 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    if seconds == math.inf:
        raise ValueError("seconds must be finite, got inf")
    if settings and not models:
        raise ValueError("settings are of games: name these as well")
    for name in op_names or ():
        if name not in OPS:
            close = difflib.get_close_matches(name, OPS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown op {name!r}{hint} Known ops: {', '.join(OPS)}")
    if op_names is None and models is None:
        op_names = models = ()
    cases: list[Case] = []
    if op_names is not None:
        cases = [c for c in ops.cases(quick) if not op_names or c.op in op_names]
    trainings: list[Training] = []
    if models is not None:
        trainings = [Training(model, settings or {}) for model in models]
        trainings = trainings or training.trainings(quick)
    where = choose_device(device)
    if reason := why_not(where.type):
        raise ValueError(f"there is nothing of ours to measure on {where}: {reason}")
    for wanted in trainings:
        training.make_trainer(wanted, str(where))
    return Plan(tuple(cases), tuple(trainings), where, compiled, quick, seconds)


@bound_threads()
def compare(plan: Plan, stop: Callable[[], bool] = lambda: False) -> Results:
    """Runs a plan, and reports progress on stderr.

    KeyboardInterrupt ends it early, as `stop` does between two cases; the results are then those of
    the cases so far. A contender that fails, by running out of memory for instance, is left out,
    with its error.
    """
    gk.tune_allocator()
    began = time.perf_counter()
    results = Results(environment(plan.device), len(plan), plan.quick)
    with progress(len(plan)) as tell:
        try:
            if plan.cases:
                results.ceilings = timing.ceilings(plan.device)
            for case in (*plan.cases, *plan.trainings):
                if stop():
                    break
                tell(case)
                results.rows.append(measure(case, plan))
                tell(case, results.rows[-1])
        except KeyboardInterrupt:
            pass
    results.took = time.perf_counter() - began
    return results


def environment(device: torch.device) -> dict[str, Any]:
    """`timing.machine()`, the device and how many processes wanted the processors before."""
    known = {"device": str(device), "processors": available(), "load": os.getloadavg()[0]}
    if device.type == "cuda":
        known |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return known | timing.machine()


def measure(case: Case | Training, plan: Plan) -> Row:
    """Every contender of one case that runs, interleaved."""
    wait = timing.waiting(plan.device)
    if isinstance(case, Case):
        runs = ops.contenders(case, plan.device, compiled=plan.compiled)
        options = {"seconds": plan.seconds, "span": 1e-3}
    else:
        runs = training.contenders(case, str(plan.device))
        options = {"seconds": (15 if plan.quick else 10) * plan.seconds, "span": 0.05}
    runs, errors = running(runs, wait)
    if plan.quick:  # also on a busy machine
        options |= {"least": 3, "most": 2 * options["seconds"]}
    timings = interleaved(runs, **{"least": 5, "wait": wait, **options})
    return Row(case, timings, errors)


def running(
    runs: Mapping[str, Run], wait: Callable[[], None]
) -> tuple[dict[str, Run], dict[str, str]]:
    """The contenders that can be called, and for the others the first line of what they raise."""
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
    """Tells on stderr what is measured: a bar on a terminal that has tqdm, else a line per case."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar = console.bar(total=total, unit="case", leave=False)

    def __enter__(self) -> Callable[..., None]:
        return self.tell

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tell(self, case: Case | Training, row: Row | None = None) -> None:
        """Before a case, and with its row after it."""
        self.done += row is not None
        if self.bar is not None:
            self.bar.set_postfix_str(str(case))
            self.bar.update(row is not None)
        elif row is not None:
            told = [f"{row.ratio(name):.2f}x {name}" for name in row.baselines if row.ratio(name)]
            told += [f"{name} failed: {why}" for name, why in row.errors.items()]
            console.say(f"[{self.done}/{self.total}] {case}: {', '.join(told)}")
