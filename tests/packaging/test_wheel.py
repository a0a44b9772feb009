"""The wheel, built and installed as a user does."""

import re
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def installed(run, wheel, tmp_path_factory):
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


def test_runs_where_it_is_installed(run, installed, tmp_path):
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


def test_console_script(run, installed, tmp_path):
    output = run(installed / "bin" / "gankernels", "info", cwd=tmp_path)
    assert gk.__version__ in output
    assert gk.build_info()["cpu_capability"] in output
