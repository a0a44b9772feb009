"""batch_norm_leaky_relu against eager PyTorch and torch.compile: the bars of the project.

``python benchmarks/batch_norm_leaky_relu.py`` prints the table and writes results/. The cases are
those of `gankernels bench`, each with a bar. Times are given in clones, the time of ``x.clone()``
in the same round, and as ratios to eager and to the best compiled form.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from script import medians, prepare, save
from torch._inductor.exc import InductorError

from gankernels import bench
from gankernels.bench.timing import Run
from gankernels.ops.record import LAYOUTS

PASSES = dict(zip(bench.PASSES, ("forward", "backward", "penalty"), strict=True))  # in results/


def cases() -> Iterator[tuple[bench.Case, float]]:
    """Each case, and how many times as fast as eager it must be."""
    op, (contiguous, channels_last) = "batch_norm_leaky_relu", LAYOUTS
    bars = {  # forward, forward + backward, penalty step
        (torch.float32, contiguous): (2.5, 2.5, 7),
        (torch.float32, channels_last): (2, 2.2, 20),
        (torch.bfloat16, contiguous): (2.5, 3, 10),
        (torch.bfloat16, channels_last): (2.5, 3, 30),
    }
    for (dtype, layout), values in bars.items():
        for shape in ((64, 128, 32, 32), (128, 128, 14, 14)):
            for what, bar in zip(bench.PASSES, values, strict=True):
                yield bench.Case(op, what, shape, dtype, layout), bar
    for shape in ((64, 256), (64, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            for what in bench.PASSES:
                yield bench.Case(op, what, shape, dtype), 1


def name_of(case: bench.Case) -> str:
    """The name in results/."""
    shape = "x".join(map(str, case.shape))
    return f"{shape} {str(case.dtype)[6:]} {case.layout} {PASSES[case.what]}"


def contenders(case: bench.Case, compiled: bool) -> dict[str, Run]:
    """The clone, eager, ours and, on request, the compiled form of one case."""
    runs = bench.contenders(case, compiled=compiled)
    if compiled:
        try:
            runs["compiled"]()
        except InductorError:
            # torch 2.13 writes C++ that does not compile for the bfloat16 penalty step.
            print(f"{case}: torch.compile fails, so its column is nan")
            del runs["compiled"]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds per case")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(
        f"{'case':52} {'clones: eager':>13} {'compiled':>9} {'ours':>6}   x eager (bar)  x compiled"
    )
    for case, bar in cases():
        name = name_of(case)
        if arguments.only not in name:
            continue
        times = medians(contenders(case, arguments.compiled), seconds=arguments.seconds)
        clones = {key: t / times["clone"] for key, t in times.items()}
        ratio = times["eager"] / times["ours"]
        against = times["compiled"] / times["ours"] if "compiled" in times else float("nan")
        verdict = " " if ratio >= bar else "!"
        print(
            f"{name:52} {clones['eager']:13.2f} {clones.get('compiled', float('nan')):9.2f} "
            f"{clones['ours']:6.2f}   {ratio:7.2f} ({bar:4}){verdict} {against:11.2f}",
            flush=True,
        )
        rows.append({"case": name, "bar": bar, "seconds": times, "times_eager": ratio})
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
