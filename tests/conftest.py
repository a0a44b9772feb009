"""Fixtures that tests of all folders share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gankernels as gk

ROOT = Path(__file__).parent.parent
CAPABILITIES = ("default", "avx2", "avx512")

# What the tests compare in float32 is not to differ by convolutions in 10 bits.
torch.backends.cudnn.allow_tf32 = False


# ---- the device under test -----------------------------------------------------------------------
#
# A test marked every_device runs on the CPU and, as a copy marked cuda, with CUDA as PyTorch's
# default device: its body makes tensors without saying where. The copies are there only where there
# is a GPU, or where `-m` asks for them, so that elsewhere the suite is as long as it was. Oracles
# are solved on the CPU, in float64. cpu_only exempts a test of a marked module.


def pytest_generate_tests(metafunc):
    test = metafunc.definition
    if not test.get_closest_marker("every_device") or test.get_closest_marker("cpu_only"):
        return
    asked_for = "cuda" in metafunc.config.option.markexpr.replace("not cuda", "")
    if asked_for or torch.cuda.is_available():
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
        metafunc.parametrize("device", devices, indirect=True)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch finds none")


@pytest.fixture(autouse=True)
def device(request):
    """Where a test's tensors are made: "cpu" or "cuda"."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    assert gk.build_info()["cuda_off_because"] is None
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _restore_global_state(device):
    """A test may change threads, backend or random state without looking after the next one."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    gk.use_backend("auto")


@pytest.fixture
def python():
    """`python(*arguments, env={}, cwd=ROOT)` runs an interpreter of its own; stdout and stderr."""

    def run(*arguments, env=None, cwd=ROOT, check=True):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment |= {name: str(value) for name, value in (env or {}).items()}
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True, text=True, cwd=cwd, env=environment,
        )  # fmt: skip
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def usable():
    """`usable(capability)`: what is used where this one is asked for, by what the CPU has."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    best = 0
    if flags >= {"avx2", "fma", "f16c"}:
        best = 2 if flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq"} else 1
    return lambda capability: CAPABILITIES[min(CAPABILITIES.index(capability), best)]


@pytest.fixture
def rerun_with_capability(python, usable):
    """`rerun_with_capability(capability, file, selection)` runs a file's tests on the CPU, selected
    as by -k, with kernels of an instruction set other than the best."""

    def rerun(capability, file, selection):
        wanted = {
            "ATEN_CPU_CAPABILITY": capability,
            "GANKERNELS_TEST_CAPABILITY": usable(capability),
        }
        result = python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", selection,
            *("-m", "not cuda"), env=wanted, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

    return rerun


def pytest_configure():
    wanted = os.environ.get("GANKERNELS_TEST_CAPABILITY")
    used = gk.build_info()["cpu_capability"]
    if wanted and used != wanted:
        raise pytest.UsageError(f"the kernels in use are {used}, not {wanted}")
