"""``pytest benchmarks/ --benchmark-only``: the cases of `gankernels bench` under pytest-benchmark.

``--full`` measures the cases of a whole run instead of the quick ones, ``-k`` selects some,
``--benchmark-group-by=group`` groups comparable ones, and ``--benchmark-json`` saves the results.
The ratios of `gankernels bench` are more reliable, because it interleaves the contenders.
"""

import pytest

import gankernels as gk
from gankernels import bench
from gankernels._threads import bound_threads
from gankernels.bench.training import trainings


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="measure all cases, not only the quick ones"
    )
    parser.addoption("--compiled", action="store_true", help="also measure torch.compile")
    parser.addoption("--device", default="cpu", help="cpu, cuda, ...")


def pytest_generate_tests(metafunc):
    quick = not metafunc.config.option.full
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(bench.cases(quick)), ids=str)
    if "training_case" in metafunc.fixturenames:
        metafunc.parametrize("training_case", trainings(quick), ids=str)


@pytest.fixture(scope="session", autouse=True)
def _as_the_command_line_does():
    gk.tune_allocator()
    with bound_threads():
        yield
