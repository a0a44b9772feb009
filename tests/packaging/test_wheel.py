"""The wheel, built and installed as a user does."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def run(*command, **options):
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True, text=True, **{"env": ENVIRONMENT, **options},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def architecture_list(built):
    """What TORCH_CUDA_ARCH_LIST has to say to get these: sm_90 is 9.0, compute_90 makes it +PTX."""
    binaries = [re.sub(r"sm_(\d+)(\d)", r"\1.\2", name) for name in built if "sm_" in name]
    return ";".join(binaries) + ("+PTX" if any("compute_" in name for name in built) else "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the objects of the build in place, so that nothing is compiled again."""
    for stale in ROOT.glob("build/lib*"):  # setuptools would pack what has been deleted since
        shutil.rmtree(stale)
    folder = tmp_path_factory.mktemp("wheel")
    info = gk.build_info()
    as_built = {
        "GANKERNELS_CUDA": "1" if info["cuda"] else "0",
        "TORCH_CUDA_ARCH_LIST": architecture_list(info["cuda_architectures"]),
    }
    run(
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
        "--no-index", "--wheel-dir", folder,
        cwd=ROOT, env={**ENVIRONMENT, **as_built},
    )  # fmt: skip
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel, which finds torch and the like where we do."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    parent = Path(torch.__file__).parent.parent
    (site / "parent.pth").write_text(f"{parent}\n")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--ignore-installed", wheel,
    )  # fmt: skip
    return folder


def test_name(wheel):
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"gankernels-{gk.__version__}-py3-none-{platform}.whl"


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {n for n in names if ".dist-info/" not in n}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "gankernels").rglob("*.py")}
    compiled = {f"gankernels/{n}" for n in ("libgankernels.so", "_build.json", "py.typed")}
    assert package == sources | compiled


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert "Requires-Python: >=3.10" in metadata
    core = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert core == ["torch>=2.10", "numpy"]
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_runs_where_it_is_installed(installed, tmp_path):
    script = """if True:
        import warnings; warnings.simplefilter("error")
        import torch, gankernels as gk
        import torch.nn.functional as F
        x = torch.randn(4, 3, 5, requires_grad=True)
        y = gk.functional.batch_norm_leaky_relu(x, None, None, training=True)
        torch.testing.assert_close(y, F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.2))
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        grad.square().sum().backward()
        assert x.grad.abs().sum() > 0
        assert gk.build_info()["kernels_off_because"] is None
        print(gk.__file__)
    """
    output = run(installed / "bin" / "python", "-c", script, cwd=tmp_path)
    assert Path(output.strip()).is_relative_to(installed)


def test_console_script(installed, tmp_path):
    output = run(installed / "bin" / "gankernels", "info", cwd=tmp_path)
    assert gk.__version__ in output
    assert gk.build_info()["cpu_capability"] in output
