"""The errors of setup.py, and the build that it writes for ninja."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import ninja
import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent.parent
PURELIB = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")


def build(folder, python=sys.executable, root=ROOT, **environment):
    """Builds into `folder`, on a machine without compilers; returns the exit code and stderr."""
    nothing = folder / "empty"
    nothing.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "NVCC", "CXX")}
    result = subprocess.run(
        [python, "setup.py", "-q", "build_ext", "--build-temp", folder, "--build-lib", folder],
        cwd=root, capture_output=True, text=True,
        env={**kept, "PATH": str(nothing), **environment},
    )  # fmt: skip
    assert not list(folder.rglob("*.so"))
    return result.returncode, result.stderr


@pytest.fixture
def python(tmp_path):
    """`python(*packages)`: a fresh interpreter that has these folders of packages, linked."""

    def make(*packages):
        venv.create(tmp_path / "venv")
        for package in packages:
            folder = Path(package)
            (tmp_path / "venv" / PURELIB / folder.name).symlink_to(folder)
        return tmp_path / "venv" / "bin" / "python"

    return make


SETUPTOOLS = Path(setuptools.__file__).parent
HACK = SETUPTOOLS.parent / "_distutils_hack"  # part of setuptools
NINJA = Path(ninja.__file__).parent


def test_cuda_demanded_without_nvcc(tmp_path):
    code, message = build(tmp_path, GANKERNELS_CUDA="1")
    assert code == 1
    assert "GANKERNELS_CUDA=1, but no nvcc is on the PATH, in NVCC or in CUDA_HOME" in message
    assert "GANKERNELS_CUDA=0" in message
    assert "Traceback" not in message


def test_unknown_choice_of_cuda(tmp_path):
    code, message = build(tmp_path, GANKERNELS_CUDA="banana")
    assert code == 1
    assert "GANKERNELS_CUDA must be auto, 0 or 1, got 'banana'" in message


@pytest.mark.parametrize("value", ["nonsense", "9.0;nonsense", "90"])
def test_unknown_architecture(tmp_path, value):
    code, message = build(tmp_path, GANKERNELS_CUDA="1", NVCC="nvcc", TORCH_CUDA_ARCH_LIST=value)
    assert code == 1
    assert "TORCH_CUDA_ARCH_LIST must list architectures such as 8.0, 9.0a or 9.0+PTX" in message
    assert f"got {value.split(';')[-1]!r}" in message


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_torch_too_old(tmp_path, python, version):
    old = tmp_path / "old" / "torch"
    old.mkdir(parents=True)
    (old / "version.py").write_text(f"__version__ = '{version}'\n")
    code, message = build(tmp_path, python(SETUPTOOLS, HACK, NINJA, old), GANKERNELS_CUDA="0")
    assert code == 1
    assert f"needs torch >= 2.10, but {version} is installed in" in message


def test_no_torch(tmp_path, python):
    code, message = build(tmp_path, python(SETUPTOOLS, HACK, NINJA), GANKERNELS_CUDA="0")
    assert code == 1
    assert "building needs PyTorch >= 2.10 in this environment, and none is installed" in message


def test_no_ninja(tmp_path, python):
    real = Path(torch.__file__).parent
    code, message = build(tmp_path, python(SETUPTOOLS, HACK, real), GANKERNELS_CUDA="0")
    assert code == 1
    assert "building needs ninja: pip install ninja" in message


def test_failed_compilation(tmp_path):
    code, message = build(tmp_path, GANKERNELS_CUDA="0", CXX="/nonexistent/compiler")
    assert code == 1
    assert "the compilation failed; the compiler's own message is above" in message


def test_sources_in_subfolders_are_built(tmp_path):
    copy, target = tmp_path / "copy", tmp_path / "build"
    copy.mkdir()
    target.mkdir()
    shutil.copy2(ROOT / "setup.py", copy)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    kernel = (
        copy / "csrc" / "kernels" / "cpu" / "norms" / "adam.cpp"
    )  # adam.cpp exists one level up
    op = copy / "csrc" / "ops" / "norms" / "new.cpp"
    for source in (kernel, op):
        source.parent.mkdir()
        source.touch()
    build(target, root=copy, GANKERNELS_CUDA="0", CXX="/nonexistent/compiler")
    lines = (target / "build.ninja").read_text().splitlines()
    (link,) = [line for line in lines if line.startswith("build libgankernels.so: link")]
    objects = {"ops_norms_new.o": op}
    for isa in ("baseline", "avx2", "avx512"):
        objects[f"cpu_norms_adam.{isa}.o"] = kernel
    for name, source in objects.items():
        rule = "op" if source == op else "kernel"
        assert f"build {name}: {rule} {source}" in lines
        assert name in link.split()
    assert len(link.split()) == len(set(link.split()))


@pytest.fixture
def cuda_command(tmp_path):
    """`cuda_command(**environment)`: what would compile a .cu file, of an nvcc that does not."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)

    def command(**environment):
        environment = {"GANKERNELS_WERROR": "", **environment}
        code, _ = build(
            tmp_path, GANKERNELS_CUDA="1", NVCC=str(nvcc), TORCH_CUDA_ARCH_LIST="9.0",
            CXX="/nonexistent/compiler", **environment,
        )  # fmt: skip
        assert code == 1
        text = (tmp_path / "build.ninja").read_text()
        return re.search(r"^rule cuda\n  command = (.*)$", text, re.MULTILINE)[1]

    return command


@pytest.mark.parametrize(("value", "strict"), [("", False), ("0", False), ("1", True)])
def test_warnings_are_errors_only_where_asked_for(cuda_command, value, strict):
    """A newer nvcc has warnings that are no reason for a user's installation to fail."""
    assert ("-Werror all-warnings" in cuda_command(GANKERNELS_WERROR=value)) is strict


def test_ci_asks_for_it():
    assert "export GANKERNELS_WERROR=1\n" in (ROOT / ".ci" / "run").read_text()
