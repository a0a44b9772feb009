"""batch_norm_leaky_relu against eager PyTorch and torch.compile: the bars of the project.

``python benchmarks/batch_norm_leaky_relu.py`` prints the table and writes results/; how each case
is computed stands in gankernels/bench/ops.py. Times are given in clones, the time of ``x.clone()``
in the same round, and as ratios to eager and to the best compiled form.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import interleaved, prepare, save
from torch._inductor.exc import InductorError

from gankernels import bench

PASSES = dict(zip(("forward", "backward", "penalty"), bench.PASSES, strict=True))


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    derivative: str  # "forward", "backward" (forward and backward) or "penalty" (a penalty step)
    bar: float  # how many times faster than eager it has to be

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{shape} {str(self.dtype)[6:]} {self.layout} {self.derivative}"


def cases() -> Iterator[Case]:
    bars = {  # (dtype, channels_last): forward, forward + backward, penalty step
        (torch.float32, False): (2.5, 2.5, 7),
        (torch.float32, True): (2, 2.2, 20),
        (torch.bfloat16, False): (2.5, 3, 10),
        (torch.bfloat16, True): (2.5, 3, 30),
    }
    for (dtype, channels_last), values in bars.items():
        for shape in ((64, 128, 32, 32), (128, 128, 14, 14)):
            for derivative, bar in zip(PASSES, values, strict=True):
                yield Case(shape, dtype, channels_last, derivative, bar)
    for shape in ((64, 256), (64, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            for derivative in PASSES:
                yield Case(shape, dtype, False, derivative, 1)


def contenders(case: Case, compiled: bool) -> dict[str, Callable[[], object]]:
    """The clone, eager, ours and, where asked for, the compiled forms of one case."""
    what = PASSES[case.derivative]
    measured = bench.Case("batch_norm_leaky_relu", what, case.shape, case.dtype, case.layout)
    runs = bench.contenders(measured, compiled=compiled)
    if compiled:
        try:
            runs["compiled"]()
        except InductorError:
            # torch 2.13 writes C++ that does not compile for the bfloat16 penalty step.
            print(f"{case}: torch.compile fails, see the column of nan")
            del runs["compiled"]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="per case")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(
        f"{'case':52} {'clones: eager':>13} {'compiled':>9} {'ours':>6}   x eager (bar)  x compiled"
    )
    for case in cases():
        if arguments.only not in str(case):
            continue
        times = interleaved(contenders(case, arguments.compiled), seconds=arguments.seconds)
        clones = {name: t / times["clone"] for name, t in times.items()}
        ratio = times["eager"] / times["ours"]
        against = times["compiled"] / times["ours"] if "compiled" in times else float("nan")
        verdict = " " if ratio >= case.bar else "!"
        print(
            f"{case!s:52} {clones['eager']:13.2f} {clones.get('compiled', float('nan')):9.2f} "
            f"{clones['ours']:6.2f}   {ratio:7.2f} ({case.bar:4}){verdict} {against:11.2f}",
            flush=True,
        )
        rows.append({"case": str(case), "bar": case.bar, "seconds": times, "times_eager": ratio})
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
