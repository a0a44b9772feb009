"""``pytest benchmarks/test_minibatch_discrimination.py --benchmark-group-by=group``"""

import pytest
from harness import prepare
from minibatch_discrimination import CASES, contenders, names

PARAMETERS = [
    pytest.param(case, name, backward, id=f"{case}-{name}-{'backward' if backward else 'forward'}")
    for case in CASES
    for backward in (False, True)
    for name in names(case)
]


@pytest.mark.parametrize(("case", "name", "backward"), PARAMETERS)
def test_time(benchmark, case, name, backward):
    prepare()
    benchmark.group = f"{case} {'forward and backward' if backward else 'forward'}"
    benchmark.extra_info["element_operations"] = case.element_operations
    benchmark(contenders(case, backward)[name])
