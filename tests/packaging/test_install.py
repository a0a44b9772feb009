"""`pip install .` and similar commands in fresh environments, and the published files."""

import importlib.metadata
import re
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent
HERE = Path(torch.__file__).parent.parent  # where torch and what it needs is installed


# ---- the source archive --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", script, cwd=ROOT)
    (path,) = folder.iterdir()
    return path


def test_source_archive(sdist):
    """All that a build takes and nothing of this machine's."""
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    patterns = ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "gankernels/**/*.py")
    sources = {str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p)}
    files = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    written = {n for n in names if n.startswith("gankernels.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - written == sources | files | {"gankernels/py.typed"}


# ---- pip install ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build_requirements(tmp_path_factory):
    """Wheels of what pyproject.toml asks for, from what is installed: pip needs no network."""
    folder = tmp_path_factory.mktemp("build_requirements")
    for name in ("setuptools", "ninja"):
        distribution = importlib.metadata.distribution(name)
        stem = f"{name}-{distribution.version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            for file in distribution.files:
                if ".." not in file.parts:
                    archive.write(file.locate(), str(file))
                elif file.name == "ninja":
                    archive.write(file.locate(), f"{stem}.data/scripts/ninja")
    return folder


@pytest.fixture
def pip_install(run, build_requirements):
    """`pip_install(folder, *arguments, fails=False, env={})`: README's command, without a network.

    Of an environment that has no pip of its own, and with pip's own build environment.
    """

    def install(folder, *arguments, **options):
        return run(
            sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
            "--no-index", "--find-links", build_requirements, *arguments, **options,
        )  # fmt: skip

    return install


def fresh(folder, *packages):
    """Makes an environment of these folders of packages, linked."""
    venv.create(folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    for package in packages:
        (site / package.name).symlink_to(package)
    return folder


def old_torch(folder, version="2.9.1"):
    """A torch of which only the version is there."""
    package = folder / "old" / "torch"
    package.mkdir(parents=True)
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    (package / "__init__.py").write_text("from .version import __version__\n")
    return package


@pytest.fixture(scope="module")
def packages():
    """torch and all that is installed beside it, but nothing that leads to this source folder."""
    unwanted = ("gankernels", "__editable__", "pip")
    return [p for p in HERE.iterdir() if not p.name.startswith(unwanted) and p.suffix != ".pth"]


def test_from_the_source_archive(run, pip_install, sdist, packages, wheel, tmp_path):
    """With a torch that is there, which stays as it is, and without CUDA kernels."""
    folder = fresh(tmp_path / "environment", *packages)
    quick = tmp_path / "quick_g++"  # optimizing would be four fifths of the time
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    pip_install(folder, sdist, env={"GANKERNELS_CUDA": "0", "CXX": quick})
    (site,) = folder.glob("lib/python3*/site-packages")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert [n for n in names if not (site / n).is_file()] == []
    script = """if True:
        import warnings; warnings.simplefilter("error")
        import torch, gankernels as gk
        layer = gk.nn.BatchNormLeakyReLU2d(8)
        x = torch.randn(4, 8, 5, 5, requires_grad=True)
        penalty = gk.functional.gradient_penalty(lambda x: layer(x).sin().mean((1, 2, 3)), x, x + 1)
        penalty.backward()
        assert layer.weight.grad.abs().sum() > 0
        info = gk.build_info()
        assert info["kernels_off_because"] is None and info["cuda"] is None
        assert info["torch"] == info["built_with_torch"]
        print(gk.__file__, info["cuda_off_because"], sep="\\n")
    """
    output = run(folder / "bin" / "python", "-c", script, cwd=tmp_path).splitlines()
    assert Path(output[0]).is_relative_to(folder)
    assert output[1].startswith("this build has no CUDA kernels")
    assert (site / "torch").is_symlink()


def test_cuda_demanded_without_nvcc(pip_install, sdist, packages, tmp_path):
    folder = fresh(tmp_path / "environment", *packages)
    without = {"PATH": str(tmp_path), "NVCC": None, "CUDA_HOME": None}
    message = pip_install(folder, sdist, fails=True, env={"GANKERNELS_CUDA": "1", **without})
    assert "gankernels: GANKERNELS_CUDA=1, but no nvcc is on the PATH" in message
    assert "Traceback" not in message


def test_torch_too_old_to_build_with(pip_install, sdist, tmp_path):
    folder = fresh(tmp_path / "environment", old_torch(tmp_path))
    message = pip_install(folder, "--no-deps", sdist, fails=True)
    assert "gankernels: needs torch >= 2.10, but 2.9.1 is installed in" in message
    assert "Traceback" not in message


def test_no_torch_to_build_with(pip_install, sdist, tmp_path):
    folder = fresh(tmp_path / "environment")
    message = pip_install(folder, "--no-deps", sdist, fails=True)
    assert "gankernels: building needs PyTorch >= 2.10 in this environment" in message
    assert "Traceback" not in message


# ---- import, where torch has been changed since --------------------------------------------------


@pytest.fixture
def imported(run, pip_install, wheel, tmp_path):
    """`imported(*packages)`: what `import gankernels` says beside them, which is an error."""

    def message(*packages):
        folder = fresh(tmp_path / "environment", *packages)
        pip_install(folder, "--no-deps", wheel)
        return run(folder / "bin" / "python", "-c", "import gankernels", fails=True, cwd=tmp_path)

    return message


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_torch_too_old_to_import(imported, tmp_path, version):
    last = imported(old_torch(tmp_path, version)).splitlines()[-1]
    said = f"ImportError: gankernels needs torch >= 2.10, but {version} is installed in "
    assert last.startswith(said)
    assert last.endswith("site-packages")


def test_no_torch_to_import(imported):
    assert imported().splitlines()[-1] == "ModuleNotFoundError: No module named 'torch'"


# ---- the wheel that can be published -------------------------------------------------------------


def test_manylinux_wheel(run, as_built, wheel, pip_install, tmp_path):
    """auditwheel has found nothing but system libraries and torch's, and changed the tag alone."""
    dist = tmp_path / "dist"
    run("make", "wheel", f"PYTHON={sys.executable}", f"DIST={dist}", cwd=ROOT, env=as_built)
    (published,) = dist.iterdir()
    platform = r"manylinux_2_\d+_x86_64(\.manylinux\w+)*"
    assert re.fullmatch(rf"gankernels-{gk.__version__}-py3-none-{platform}\.whl", published.name)
    before, after = (
        {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}
        for archive in map(zipfile.ZipFile, (wheel, published))
    )
    changed = {Path(n).name for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    assert changed == {"WHEEL", "RECORD"}
    pip_install(fresh(tmp_path / "environment"), "--no-deps", published)  # this machine meets it
