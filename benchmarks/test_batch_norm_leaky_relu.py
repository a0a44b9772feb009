"""The cases of batch_norm_leaky_relu.py under pytest-benchmark, one test per contender.

``pytest benchmarks/test_batch_norm_leaky_relu.py`` (``-k`` selects; ``--benchmark-json`` saves).
Ratios are better read off ``python benchmarks/batch_norm_leaky_relu.py``, which interleaves.
"""

import pytest
from batch_norm_leaky_relu import cases, contenders
from harness import prepare

CASES = list(cases())


@pytest.mark.parametrize("contender", ["clone", "eager", "compiled", "ours"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_leaky_relu(benchmark, case, contender):
    prepare()
    benchmark.group = str(case)
    run = contenders(case, compiled=contender == "compiled")[contender]
    run()  # compiles, where there is something to compile
    benchmark(run)
