"""Measures minibatch standard deviation against the same in PyTorch's ops.

``python benchmarks/minibatch_stddev.py`` prints the table, ``--save NAME`` writes results/. The
cases are those of `gankernels bench`; "least" is the number of clones of x that move as many bytes
as the step must.
"""

from __future__ import annotations

import torch
from script import arguments_of, medians, save

from gankernels import bench

SHAPES = ((64, 512, 4, 4), (64, 256, 16, 16), (16, 512, 8, 8))
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    arguments = arguments_of(__doc__)
    rows = []
    print(f"{'case':46} {'eager ms':>9} {'ours ms':>9}  x eager  clones (least)")
    for shape in SHAPES:
        for dtype in DTYPES:
            for what in bench.PASSES:
                case = bench.Case("minibatch_stddev", what, shape, dtype)
                times = medians(bench.contenders(case), seconds=arguments.seconds)
                times["yardstick"] = times.pop("clone")
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {what}"
                ratio = times["eager"] / times["ours"]
                clones = times["ours"] / times["yardstick"]
                print(
                    f"{name:46} {1e3 * times['eager']:9.3f} {1e3 * times['ours']:9.3f}"
                    f"  {ratio:7.2f}  {clones:6.2f} ({case.fewest_clones})",
                    flush=True,
                )
                rows.append({"case": name, "seconds": times, "times_eager": ratio})
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
