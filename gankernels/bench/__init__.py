"""Measures the ops and the games against plain PyTorch: `gankernels bench`.

    results = compare(plan(quick=True))
    write(results, "bench")  # results.json, index.html and PNG plots

`ops` has the cases of the ops, `training` those of the games, `timing` the clock, and `run` puts
them together; `results` is what they return, and `table` and `page` show it. The test suite and
the scripts in benchmarks/ are built from the same parts.
"""

from gankernels.bench.ops import OPS, PASSES, Case, cases, contenders
from gankernels.bench.page import write
from gankernels.bench.results import Results, Row
from gankernels.bench.run import Plan, compare, plan
from gankernels.bench.table import describe
from gankernels.bench.timing import Timing, interleaved

__all__ = [
    "OPS",
    "PASSES",
    "Case",
    "Plan",
    "Results",
    "Row",
    "Timing",
    "cases",
    "compare",
    "contenders",
    "describe",
    "interleaved",
    "plan",
    "write",
]
