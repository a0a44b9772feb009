"""The wheel, built and installed as a user does."""

import email
import re
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import gankernels as gk

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.10"
    core = [text for text in metadata.get_all("Requires-Dist") if ";" not in text]
    assert core == PROJECT["project"]["dependencies"]
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert f"Copyright (c) 2026, {metadata['Author']}\n" in (ROOT / "LICENSE").read_text()
    urls = dict(text.split(", ") for text in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Issues", "Changelog"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    known = {c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") if "Python :: 3." in c}
    assert known == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    assert metadata.get_payload().startswith("# gankernels")


def test_every_dependency_has_a_lower_bound():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    wanted += [text for extra in extras.values() for text in extra]
    lowest = {}
    for requirement in map(Requirement, wanted):
        (bound,) = (each for each in requirement.specifier if each.operator == ">=")
        assert lowest.setdefault(requirement.name, bound.version) == bound.version


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
