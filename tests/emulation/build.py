"""Compiles the project's .cu files for the CPU emulation of CUDA, into `build/` beside this file.

A variant is a folder with `libkernels.so` (the .cu files and the emulation) and the Python module
`emulated` (the bindings). The kernels are a library of their own because all thread-local variables
of it are shared memory to the emulation.
"""

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
    *["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"],
    "-fno-strict-aliasing",  # vectors are accessed as integers of the same size
    "-fno-gnu-unique",  # or variants in one process would share the variables of templates
    "-ffp-contract=off",
    *["-I", str(HERE / "include"), "-I", str(KERNELS), "-I", str(HERE)],
]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Substitution:
    """A change to a .cu or .h file under csrc/kernels, for a copy with a seeded defect."""

    file: str
    old: str
    new: str


def _digest(flags: Sequence[str], substitutions: Sequence[Substitution]) -> str:
    digest = hashlib.sha256(repr((COMPILER, flags, substitutions, sys.version)).encode())
    own = [p for p in HERE.rglob("*") if p.suffix in {".h", ".cpp", ".cu"}]
    headers = [p for p in KERNELS.rglob("*") if p.suffix in {".h", ".cu"}]
    for path in sorted(own + headers):
        if BUILD not in path.parents:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def build(
    variant: str, *, sanitize: bool = False, substitutions: Sequence[Substitution] = ()
) -> Path:
    """The variant's folder, compiled if anything it is made of has changed."""
    flags = FLAGS + (SANITIZE if sanitize else [])
    folder = BUILD / variant
    digest = _digest(flags, substitutions)
    stamp = folder / "digest"
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    kernels = KERNELS
    if substitutions:
        kernels = folder / "kernels"
        shutil.copytree(KERNELS, kernels)
        for s in substitutions:
            path = kernels / s.file
            text = path.read_text()
            if text.count(s.old) != 1:
                raise ValueError(
                    f"{s.file} has {text.count(s.old)} times, not once, the text {s.old!r}"
                )
            path.write_text(text.replace(s.old, s.new))

    include = ["-I", str(kernels), *flags]
    units = [*sorted((kernels / "cuda").glob("*.cu")), HERE / "self_test.cu", HERE / "emulation.cpp"]
    objects = [folder / f"{unit.stem}.o" for unit in units]
    commands = [
        [*COMPILER, *include, "-x", "c++", "-c", unit, "-o", o]
        for unit, o in zip(units, objects, strict=True)
    ]
    if substitutions:  # the bindings see nothing of what is changed
        bindings = build("plain") / "bindings.o"
    else:
        bindings = folder / "bindings.o"
        python = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
        commands.insert(
            0,
            [*COMPILER, *include, *python, "-O0", "-fvisibility=hidden"]
            + ["-c", HERE / "bindings.cpp", "-o", bindings],
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run([*COMPILER, *flags, "-shared", *objects, "-o", folder / "libkernels.so", "-ldl"])
    module = folder / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(
        [*COMPILER, *flags, "-shared", bindings, "-o", module]
        + [f"-L{folder}", "-lkernels", "-Wl,-rpath,$ORIGIN"]
    )
    stamp.write_text(digest)
    return folder


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def load(folder: Path) -> ModuleType:
    """The module `emulated` of a variant; one variant per process."""
    (path,) = folder.glob("emulated*.so")
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
