"""Compiles the project's .cu files for the CPU emulation of CUDA, into `build/` beside this file.

A variant is a folder with `libkernels_VARIANT.so` (the .cu files and the emulation) and the Python
module `emulated` (the bindings). The kernels are a library of their own because all thread-local
variables of it are shared memory to the emulation. Several variants can live in one process.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "kernels"
BUILD = HERE / "build"

COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = [
    *["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"],
    # Vectors are accessed as integers of the same size, which look at the addresses they meet.
    *["-fno-strict-aliasing", "-Wno-class-memaccess"],
    "-fno-gnu-unique",  # or variants in one process would share the variables of templates
    "-ffp-contract=off",
    *["-I", str(HERE / "include"), "-I", str(HERE)],
]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Substitution:
    """A change to a .cu or .h file under csrc/kernels, for a copy with a seeded defect.

    Only one .cu file is compiled anew: the changed one, or for a header the one named by `unit`.
    """

    file: str
    old: str
    new: str
    unit: str = ""


def _digest(flags: Sequence[str], substitutions: Sequence[Substitution]) -> str:
    digest = hashlib.sha256(repr((COMPILER, flags, substitutions, sys.version)).encode())
    for folder in (HERE, HERE / "include", KERNELS, KERNELS / "cuda"):
        for path in sorted(folder.glob("*.*")):
            if path.suffix in {".h", ".cpp", ".cu"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()


_built: dict[str, Path] = {}


def build(
    variant: str, *, sanitize: bool = False, substitutions: Sequence[Substitution] = ()
) -> Path:
    """The variant's folder, compiled if anything it is made of has changed since the last time.

    Looks for changes once per process, so that they do not hurt while tests run.
    """
    if variant not in _built:
        BUILD.mkdir(exist_ok=True)
        with open(BUILD / f"{variant}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _built[variant] = _build(variant, sanitize, substitutions)
    return _built[variant]


def _build(variant: str, sanitize: bool, substitutions: Sequence[Substitution]) -> Path:
    # Defective copies run a few small problems only: quick to compile beats quick to run.
    flags = [*FLAGS, "-O0" if substitutions else "-O1", *(SANITIZE if sanitize else [])]
    folder = BUILD / variant
    digest = _digest(flags, substitutions)
    stamp = folder / "digest"
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kernels = _copy_with(substitutions, folder / "kernels") if substitutions else KERNELS

    cuda = ["-x", "c++", "-I", kernels]
    units = sorted((kernels / "cuda").glob("*.cu"))
    changed = {s.unit or s.file for s in substitutions}
    commands = {
        folder / f"{unit.stem}.o": [*COMPILER, *flags, *cuda, "-c", unit]
        for unit in units
        if not changed or f"cuda/{unit.name}" in changed
    }
    # The rest of a defective copy sees nothing of what is changed.
    rest = build("plain") if substitutions else folder
    emulation = [rest / "emulation.o", rest / "self_test.o"]
    bindings = rest / "bindings.o"
    if not substitutions:
        python = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include(), "-O0"]
        python += ["-fvisibility=hidden", "-I", KERNELS]
        commands |= {
            bindings: [*COMPILER, *flags, *python, "-c", HERE / "bindings.cpp"],
            emulation[0]: [*COMPILER, *flags, "-c", HERE / "emulation.cpp"],
            emulation[1]: [*COMPILER, *flags, *cuda, "-c", HERE / "self_test.cu"],
        }
    kernel_objects = [folder / f"{unit.stem}.o" for unit in units]
    objects = [o if o in commands else rest / o.name for o in kernel_objects] + emulation
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, ([*command, "-o", o] for o, command in commands.items())))
    link = [*COMPILER, *flags, "-shared"]
    library = f"libkernels_{variant}.so"
    _run([*link, *objects, f"-Wl,-soname,{library}", "-o", folder / library, "-ldl"])
    module = folder / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*link, bindings, folder / library, "-Wl,-rpath,$ORIGIN", "-o", module])
    stamp.write_text(digest)
    return folder


def _copy_with(substitutions: Sequence[Substitution], folder: Path) -> Path:
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("cpu"))
    for s in substitutions:
        path = folder / s.file
        text = path.read_text()
        if text.count(s.old) != 1:
            raise ValueError(
                f"{s.file} has {text.count(s.old)} times, not once, the text {s.old!r}"
            )
        path.write_text(text.replace(s.old, s.new))
    return folder


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def load(folder: Path) -> ModuleType:
    """The module `emulated` of a variant."""
    (path,) = folder.glob("emulated*.so")
    # Under a name of its own: pybind11 hands out a module that it has seen by that name.
    spec = importlib.util.spec_from_file_location(f"{folder.name}.emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
