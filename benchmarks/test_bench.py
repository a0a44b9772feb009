"""One test per contender of every case; see conftest.py for the options."""

import pytest

from gankernels.bench import ops, training
from gankernels.bench.timing import waiting


def run_in(benchmark, group, runs, name, device):
    if name not in runs:
        pytest.skip(f"no {name} here")
    wait = waiting(device)

    def run():
        runs[name]()
        wait()

    benchmark.group = group
    run()  # compiles, where there is something to compile
    benchmark(run)


@pytest.mark.parametrize("contender", ["clone", "eager", "cdist", "compiled", "ours"])
def test_op(benchmark, pytestconfig, case, contender):
    if contender == "compiled" and not pytestconfig.option.compiled:
        pytest.skip("without --compiled")
    device = pytestconfig.option.device
    runs = ops.contenders(case, device, compiled=contender == "compiled")
    run_in(benchmark, str(case), runs, contender, device)


@pytest.mark.parametrize("contender", ["eager", "ours"])
def test_training_iteration(benchmark, pytestconfig, training_case, contender):
    device = pytestconfig.option.device
    runs = training.contenders(training_case, device)
    run_in(benchmark, str(training_case), runs, contender, device)
