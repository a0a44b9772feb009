"""How fast the ops and the games are here, beside PyTorch without them: `gankernels bench`.

    results = compare(plan(quick=True))
    write(results, "bench")  # results.json, index.html and PNG plots

`ops` has the cases, `timing` the clock, `training` whole iterations, `run` puts them together;
`results`, `table` and `page` are what comes of it. The suite in benchmarks/ and the scripts there
are built from the same parts.
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
