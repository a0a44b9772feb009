"""Minibatch discrimination against broadcasting and cdist: time, peak memory, element operations.

``python benchmarks/minibatch_discrimination.py`` prints the table and writes results/; how each
case is computed is in gankernels/bench/ops.py. One element operation is one
|m[i,b,c] - m[j,b,c]| of a pair i < j, added to its distance: two additions. A peak that is given in
additions per second (lanes of a vector x additions per cycle x clock x cores) is therefore reached
at half as many element operations.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from script import medians, prepare, save

from gankernels import bench


@dataclass(frozen=True)
class Bars:
    n: int
    b: int
    c: int
    bars: tuple[float, float] = (0, 0)  # speed-up over broadcasting and over cdist
    #: Calls in a row, so that cache contents left by other contenders do not matter.
    repeats: int = 1

    def __str__(self) -> str:
        return f"({self.n},{self.b},{self.c})"

    @property
    def element_operations(self) -> int:
        return self.n * (self.n - 1) // 2 * self.b * self.c


CASES = (
    Bars(64, 100, 5, (15, 0), repeats=10),
    Bars(128, 100, 5, (25, 0), repeats=10),
    Bars(512, 100, 16, (45, 20)),
    Bars(4096, 32, 16),
)


def contenders(case: Bars, backward: bool = True) -> dict[str, Callable[[], object]]:
    """Returns forward, or forward and backward, by every contender that fits into memory."""
    what = "forward + backward" if backward else "forward"
    shape = (case.n, case.b, case.c)
    runs = bench.contenders(bench.Case("minibatch_discrimination", what, shape))
    names = {"broadcasting": "eager", "cdist": "cdist", "ours": "ours"}
    return {name: runs[key] for name, key in names.items() if key in runs}


def measure(case: Bars, runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    def repeated(run: Callable[[], object]) -> None:
        for _ in range(case.repeats):
            run()

    repeating = {name: lambda r=run: repeated(r) for name, run in runs.items()}
    times = medians(repeating, seconds=seconds, least=3)
    return {name: t / case.repeats for name, t in times.items()}


def peak_memory(case: Bars, name: str) -> int:
    """Measures the peak memory of forward and backward, in bytes, in a separate process."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import minibatch_discrimination as b; c = b.Bars({case.n}, {case.b}, {case.c})\n"
        f"b.print_peak_memory(c, {name!r})"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout)


def print_peak_memory(case: Bars, name: str) -> None:
    contenders(Bars(2, 1, 1))[name]()  # excludes everything that is loaded on first use
    run = contenders(case)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)


def status(name: str) -> int:
    """Reads a number of bytes from the status that Linux reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="seconds per case")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument(
        "--peak", type=float, help="peak additions of all threads, in 1e9 per second"
    )
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    cases = [case for case in CASES if arguments.only in str(case)]
    # Memory first, because the timed calls leave gigabytes allocated in this process.
    peaks = {
        case: {name: peak_memory(case, name) for name in contenders(case)}
        for case in cases
        if arguments.memory
    }
    for case in cases:
        memory = peaks.get(case, {})
        times = measure(case, contenders(case), arguments.seconds)
        forward = measure(case, {"ours": contenders(case, False)["ours"]}, 0.5)["ours"]
        rates = {
            "forward": case.element_operations / forward,
            "backward": case.element_operations / (times["ours"] - forward),
        }
        print(f"{case}: forward and backward")
        for name, seconds in times.items():
            line = f"  {name:13} {seconds * 1e3:9.3f} ms"
            if name != "ours":
                bar = case.bars[name == "cdist"]
                ratio = seconds / times["ours"]
                line += f"  {ratio:6.1f}x ours" + (f" (bar {bar})" if bar else "")
                line += " !" if ratio < bar else ""
            if memory:
                line += f"  {memory[name] / 2**20:9.1f} MiB"
            print(line)
        for name, rate in rates.items():
            line = f"  {name}: {rate / 1e9:.1f}e9 element operations per second"
            if arguments.peak:
                line += f", {2 * rate / arguments.peak / 1e9:.0%} of the peak"
            print(line, flush=True)
        rows.append(
            {
                "case": [case.n, case.b, case.c],
                "bars": case.bars,
                "seconds": times,
                "forward_seconds": forward,
                "element_operations_per_second": rates,
                "peak_additions_per_second": arguments.peak and arguments.peak * 1e9,
                "peak_memory_bytes": memory,
            }
        )
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
