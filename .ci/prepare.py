"""Makes a Python ready for this project and prints its path: what every make target starts with.

Where the running Python has a suitable torch, it is used as it is and only packages that it lacks
are installed. Otherwise a virtual environment is made in .venv, with the torch that was asked for.
Then the kernels are built in place, CUDA ones for this machine's GPU only, to save time, unless
``--no-kernels`` is given; a second call finds everything done.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 10)


def has_suitable_torch() -> bool:
    try:
        return tuple(int(part) for part in version("torch").split(".")[:2]) >= OLDEST_TORCH
    except PackageNotFoundError:
        return False


def call(*command: str) -> None:
    # Standard output is for the path alone.
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit(f"make: failed: {' '.join(command)}")


def this_gpu() -> str:
    """Returns the compute capability of this machine's GPU, or one to compile for without any."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return ";".join(sorted(set(found))) or "9.0"


def missing(extras: list[str]) -> list[str]:
    """Returns the requirements of the project and of these extras that are not met here."""
    from pip._vendor.packaging.requirements import Requirement

    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]

    def met(requirement: Requirement) -> bool:
        try:
            return requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            return False

    return [text for text in wanted if not met(Requirement(text))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="of pyproject.toml, to be installed as well")
    parser.add_argument("--torch", default="torch", help="what pip installs where there is none")
    parser.add_argument("--no-kernels", action="store_true", help="do not build the kernels")
    arguments = parser.parse_args()

    inside = Path(sys.prefix) == ROOT / ".venv"
    if not inside and not has_suitable_torch():
        python = ROOT / ".venv" / "bin" / "python"
        if not python.exists():
            print("make: creating .venv", file=sys.stderr)
            call(sys.executable, "-m", "venv", str(ROOT / ".venv"))
        sys.exit(subprocess.run([str(python), *sys.argv]).returncode)

    def install(*requirements: str) -> None:
        print(f"make: installing {' '.join(requirements)}", file=sys.stderr)
        call(sys.executable, "-m", "pip", "install", "--quiet", *requirements)

    if not has_suitable_torch():
        install(arguments.torch)
    if lacking := missing(arguments.extras):
        install(*lacking)
    if not arguments.no_kernels:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", this_gpu())
        call(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    print(sys.executable)


if __name__ == "__main__":
    main()
