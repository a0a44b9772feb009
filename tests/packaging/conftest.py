"""Builds that all tests in this folder share."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def run():
    """`run(*command, fails=False, env={}, cwd=None)` as a user would; stdout, and stderr if fails.

    A variable of `env` that is None is taken away.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def call(*command, fails=False, env=None, cwd=None):
        environment = {k: v for k, v in {**inherited, **(env or {})}.items() if v is not None}
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment
        )
        everything = result.stdout + result.stderr
        assert bool(result.returncode) is fails, everything
        return everything if fails else result.stdout

    return call


def architecture_list(built):
    """What TORCH_CUDA_ARCH_LIST has to say to get these: sm_90 is 9.0, compute_90 makes it +PTX."""
    binaries = [re.sub(r"sm_(\d+)(\d)", r"\1.\2", name) for name in built if "sm_" in name]
    return ";".join(binaries) + ("+PTX" if any("compute_" in name for name in built) else "")


@pytest.fixture(scope="session")
def as_built():
    """The variables that make a build reuse the objects of the build in place."""
    info = gk.build_info()
    return {
        "GANKERNELS_CUDA": "1" if info["cuda"] else "0",
        "TORCH_CUDA_ARCH_LIST": architecture_list(info["cuda_architectures"]),
    }


@pytest.fixture(scope="session")
def wheel(run, as_built, tmp_path_factory):
    for stale in ROOT.glob("build/lib*"):  # setuptools would pack what has been deleted since
        shutil.rmtree(stale)
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
        "--no-index", "--wheel-dir", folder,
        cwd=ROOT, env=as_built,
    )  # fmt: skip
    (path,) = folder.iterdir()
    return path
