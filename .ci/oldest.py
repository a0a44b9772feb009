"""The oldest versions that pyproject.toml allows, in an environment of their own: `make oldest`.

Prints the path of its Python. torch is the one asked for, since not every machine has the oldest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "oldest"
#: What tests in that environment do not use.
TOOLS = {"torch", "torch-fidelity", "auditwheel", "ruff", "clang-format", "mypy"}


def oldest() -> list[str]:
    """Returns requirements like `numpy==1.24.4`, one for every `numpy>=1.24.4` of the project."""
    from pip._vendor.packaging.requirements import Requirement

    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    wanted = [*content["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    pinned = {}
    for requirement in map(Requirement, wanted):
        (bound,) = requirement.specifier
        if requirement.name not in TOOLS:
            pinned[requirement.name] = f"{requirement.name}=={bound.version}"
    return list(pinned.values())


def main() -> None:
    python = FOLDER / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", sys.argv[1])
    for command in ((sys.executable, "-m", "venv", FOLDER), (*install, *oldest())):
        if subprocess.run(list(map(str, command)), stdout=sys.stderr).returncode:
            sys.exit(f"make: failed: {' '.join(map(str, command))}")
    print(python)


if __name__ == "__main__":
    main()
