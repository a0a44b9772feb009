"""The symbols that the compiled library needs from the machine and from torch."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "gankernels" / "libgankernels.so"


def lines_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def undefined_symbols():
    return [line.split()[-1] for line in lines_of("nm", "-D", "--undefined-only", str(LIBRARY))]


def test_undefined_symbols_are_plain_c_and_none_is_pythons():
    """So that one file serves every Python and every torch since the stable ABI."""
    of_the_system = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
    of_every_library = {
        "_ITM_deregisterTMCloneTable",
        "_ITM_registerTMCloneTable",
        "__gmon_start__",
    }
    others = {s for s in undefined_symbols() if not of_the_system.match(s)} - of_every_library
    assert others
    assert [s for s in others if not re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", s)] == []


def test_a_cpu_only_torch_has_all_symbols_that_are_not_weak():
    """Whatever only a CUDA build of torch has may be missing, and the library still loads."""
    cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    listed = [line.split() for line in lines_of("nm", "-D", "--undefined-only", str(LIBRARY))]
    strong = [name for kind, name in listed if kind == "U" and "torch_" in name]
    assert strong
    assert [name for name in strong if not hasattr(cpu, name)] == []
    assert ["w", "aoti_torch_get_current_cuda_stream"] in listed


def test_linked_libraries():
    needed = re.findall(r"NEEDED\s+(\S+)", "\n".join(lines_of("objdump", "-p", str(LIBRARY))))
    assert "libtorch.so" in needed
    assert [n for n in needed if n.startswith(("libpython", "libcudart", "libtorch_cuda"))] == []


def test_nothing_says_where_it_was_built():
    """Neither the checks of torch's headers, nor what nvcc's linker keeps, nor a path to search."""
    text = LIBRARY.read_bytes()
    folders = {ROOT, Path.home(), Path(torch.__file__).parent, Path(sys.prefix), Path("/home")}
    folders |= {folder.resolve() for folder in folders}
    # A home folder of / or of a word that any text may contain says nothing.
    assert [f for f in folders if len(f.parts) > 1 and f"{f}/".encode() in text] == []
    assert b"gankernels/csrc/ops/" in text
    assert b"torch/include/torch/csrc/stable/" in text
    dynamic = "\n".join(lines_of("objdump", "-p", str(LIBRARY)))
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert ".debug_" not in "\n".join(lines_of("objdump", "-h", str(LIBRARY)))


# ---- instruction sets: the library holds all of them, and chooses at run time --------------------

# Registers and masks that only AVX-512 has; what only AVX and later have.
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")
AVX = re.compile(r"%ymm|\tv[a-z]")
OBJECTS = sorted(ROOT.glob("build/temp.*/*.o"))


def instruction_set(path):
    """Of an object: cpu_NAME.avx2.o is compiled for AVX2, ops_NAME.o for every machine."""
    return path.name.split(".")[1] if path.name.count(".") > 1 else "baseline"


def test_library_and_objects_are_of_every_instruction_set():
    """The checks below are of the objects, as the build in place has left them."""
    assert {instruction_set(path) for path in OBJECTS} == {"baseline", "avx2", "avx512"}
    functions = "\n".join(lines_of("nm", "-C", str(LIBRARY)))
    for isa in gk.build_info()["cpu_instruction_sets"]:
        assert f"gankernels::{isa}::batch_norm_leaky_relu_forward(" in functions


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_instructions(path):
    """No machine meets instructions that it lacks."""
    code = "\n".join(lines_of("objdump", "-d", "--no-show-raw-insn", str(path)))
    isa = instruction_set(path)
    assert bool(AVX512.search(code)) is (isa == "avx512")
    assert bool(AVX.search(code)) is (isa in ("avx2", "avx512"))


@pytest.mark.parametrize(
    "path", [o for o in OBJECTS if instruction_set(o) != "baseline"], ids=lambda path: path.name
)
def test_objects_of_an_instruction_set_share_no_symbol(path):
    """Of a weak symbol one copy would be kept for all, in whichever instruction set comes first."""
    home = f"gankernels::{instruction_set(path)}::"
    for line in lines_of("nm", "-C", "--defined-only", str(path)):
        _, kind, name = line.split(maxsplit=2)
        assert kind not in "WwVvu", name
        assert kind.islower() or name.startswith(home), name
