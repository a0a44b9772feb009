"""Compiles the project's .cu files for the CPU emulation of CUDA, into `build/` next to this file.

A variant is a folder with `libkernels_VARIANT.so` (the .cu files and the emulation) and the Python
module `emulated` (the bindings). The kernels have a library of their own because the emulation
treats all of its thread-local variables as shared memory. `plain` contains every mutant of the
kernels (csrc/kernels/mutant.h), to be selected at run time; `sanitized` contains none.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "kernels"
CUDA = KERNELS / "cuda"
BUILD = HERE / "build"

COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = [
    *["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"],
    # Vectors are accessed as integers of the same size, whose copies check their addresses.
    *["-fno-strict-aliasing", "-Wno-class-memaccess"],
    "-fno-gnu-unique",  # or variants in one process would share the variables of templates
    "-ffp-contract=off",
    *["-I", str(HERE / "include"), "-I", str(HERE)],
]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
MARK = re.compile(r"\bGK_(MUTANT|MUTANT_ADDS|LIMIT)\(\s*(\w+),")


def _sources() -> list[Path]:
    """The kernels' sources that an emulated kernel may consist of."""
    return sorted(p for p in [*KERNELS.glob("*.h"), *CUDA.rglob("*.h"), *CUDA.glob("*.cu")])


@cache
def marks() -> dict[str, str]:
    """The names of all marks in the kernels' sources, each with the macro that it is marked by."""
    sources = [path for path in _sources() if path.name != "mutant.h"]
    found = [m for path in sources for m in MARK.findall(path.read_text())]
    twice = [name for name, count in Counter(name for _, name in found).items() if count > 1]
    if twice:
        raise ValueError(f"the names of marks must be unique, got several of {', '.join(twice)}")
    return {name: f"GK_{kind}" for kind, name in found}


def _digest(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((COMPILER, flags, sys.version)).encode())
    ours = [p for p in (*HERE.glob("*.*"), *HERE.glob("include/*")) if p.suffix != ".pyc"]
    for path in (*sorted(ours), *_sources()):
        if path.suffix in {".h", ".cpp", ".cu"} or path.name == Path(__file__).name:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def build(variant: str, *, sanitize: bool = False) -> Path:
    """The variant's folder, compiled if anything it is made of has changed since the last time.

    Looks for changes once per process, so that files may be edited while tests run.
    """
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{variant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(variant, sanitize)


def _build(variant: str, sanitize: bool) -> Path:
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    folder = BUILD / variant
    digest = _digest(flags)
    stamp = folder / "digest"
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    listed = " ".join(f"X({name})" for name in marks())
    (folder / "marks.h").write_text(f"#define EMULATED_MARKS(X) {listed}\n")
    flags += ["-I", str(folder)]

    cuda = ["-x", "c++", "-I", KERNELS]
    mutants = [] if sanitize else ["-include", "mutants.h"]
    python = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include(), "-O0"]
    python += ["-fvisibility=hidden", "-I", KERNELS]
    bindings = folder / "bindings.o"
    commands = {
        **{
            folder / f"{unit.stem}.o": [*cuda, *mutants, unit] for unit in sorted(CUDA.glob("*.cu"))
        },
        folder / "self_test.o": [*cuda, HERE / "self_test.cu"],
        folder / "emulation.o": [HERE / "emulation.cpp"],
        bindings: [*python, HERE / "bindings.cpp"],
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compilations = (
            [*COMPILER, *flags, *command, "-c", "-o", o] for o, command in commands.items()
        )
        list(pool.map(_run, compilations))
    link = [*COMPILER, *flags, "-shared"]
    library = f"libkernels_{variant}.so"
    objects = [o for o in commands if o != bindings]
    _run([*link, *objects, f"-Wl,-soname,{library}", "-o", folder / library, "-ldl"])
    module = folder / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*link, bindings, folder / library, "-Wl,-rpath,$ORIGIN", "-o", module])
    stamp.write_text(digest)
    return folder


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")


def load(folder: Path) -> ModuleType:
    """The module `emulated` of a variant."""
    (path,) = folder.glob("emulated*.so")
    # Under a name of its own: pybind11 returns an earlier module of the same name again.
    spec = importlib.util.spec_from_file_location(f"{folder.name}.emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
