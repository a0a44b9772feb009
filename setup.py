"""Builds `gankernels/libgankernels.so`: PyTorch's stable ABI, no Python symbols, CUDA with nvcc.

PyTorch's CUDAExtension is not used: it refuses CUDA sources if torch is CPU-only, and ties the
result to one Python and one torch. Here g++ compiles every file that includes torch, nvcc compiles
the others, and ninja schedules the work. Every source below csrc/kernels/cpu, csrc/kernels/cuda and
csrc/ops is built, and the compilers report the headers that it depends on. Environment variables:

GANKERNELS_CUDA       auto (default): build the CUDA kernels if nvcc is found; 1: fail without nvcc;
                      0: do not build them
TORCH_CUDA_ARCH_LIST  as for PyTorch's own extensions, e.g. "9.0" or "8.0;9.0+PTX"
CXX, NVCC             the compilers
MAX_JOBS              the number of compilers that run at a time
GANKERNELS_WERROR     1: treat nvcc's warnings as errors, as CI does; a newer nvcc may have new ones

The PTX and machine code of the kernels are kept next to their objects, for
tests/packaging/ptx_lint.py.
"""

import fcntl
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libgankernels.so"
RECORD = "_build.json"  # what was built, for gankernels.build_info()
OLDEST_TORCH = (2, 10)

CPU_ISAS = {
    "baseline": "-msse2",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
}


def find_torch() -> tuple[Path, str]:
    """Returns torch's folder and version, found without importing it."""
    # pip's isolated build environment hides the packages of the environment that is installed into,
    # but purelib still names their folder.
    folder = Path(sysconfig.get_path("purelib")) / "torch"
    if not folder.exists():
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            sys.exit(
                "gankernels: building needs PyTorch >= 2.10 in this environment, and none is "
                "installed. Install it first (see pytorch.org for CPU and CUDA builds), then "
                "install gankernels."
            )
        folder = Path(spec.origin).parent
    version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        sys.exit(f"gankernels: needs torch >= 2.10, but {version} is installed in {folder.parent}")
    return folder, version


def find_nvcc() -> str | None:
    choice = os.environ.get("GANKERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"gankernels: GANKERNELS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return None
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=Path(os.environ["CUDA_HOME"]) / "bin")
    if nvcc is None and choice == "1":
        sys.exit(
            "gankernels: GANKERNELS_CUDA=1, but no nvcc is on the PATH, in NVCC or in CUDA_HOME. "
            "Install the CUDA toolkit, or set GANKERNELS_CUDA=0 to build without CUDA kernels."
        )
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """Returns the values of nvcc's -gencode: TORCH_CUDA_ARCH_LIST, or all GPUs since Turing."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted:
        values = []
        for name in re.split(r"[;,\s]+", wanted.strip()):
            match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
            if match is None:
                sys.exit(
                    "gankernels: TORCH_CUDA_ARCH_LIST must list architectures such as 8.0, 9.0a "
                    f"or 9.0+PTX, got {name!r}"
                )
            number = match[1] + match[2]
            values.append(f"arch=compute_{number},code=sm_{number}")
            if match[3]:
                values.append(f"arch=compute_{number},code=compute_{number}")
        return values
    listed = run(nvcc, "--list-gpu-arch")
    known = sorted({int(n) for n in re.findall(r"compute_(\d+)", listed)})
    # A binary also runs on all later minor versions of its generation, so these cover every GPU
    # since Turing in an x86-64 machine, and PTX covers newer ones. Neither covers Thor (sm_110),
    # which only ARM machines have.
    numbers = [n for n in (75, 80, 86, 89, 90, 100, 120) if n in known]
    values = [f"arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*values, f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def find_ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    sys.exit("gankernels: building needs ninja: pip install ninja")


class BuildLibrary(build_ext):
    """Writes a build.ninja, runs it, and puts the library and its record into the package."""

    def run(self) -> None:
        torch, torch_version = find_torch()
        nvcc = find_nvcc()
        cxx = os.environ.get("CXX", "g++")
        architectures = cuda_architectures(nvcc) if nvcc else []

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        lock = (build / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
        (build / "build.ninja").write_text(self.ninja(torch, cxx, nvcc, architectures))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([*find_ninja(), "-C", str(build), *jobs]).returncode:
            sys.exit("gankernels: the compilation failed; the compiler's own message is above")

        record = {
            "torch": torch_version,
            "compiler": run(cxx, "--version").splitlines()[0],
            "cpu_instruction_sets": list(CPU_ISAS),
            "cuda": re.search(r"release ([\d.]+)", run(nvcc, "--version"))[1] if nvcc else None,
            "cuda_architectures": [re.search(r"code=(\w+)", a)[1] for a in architectures],
        }
        target = self.output_folder()
        target.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old library mapped keeps it whole.
        shutil.copy2(build / LIBRARY, target / f"{LIBRARY}.new")
        os.replace(target / f"{LIBRARY}.new", target / LIBRARY)
        (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def ninja(self, torch: Path, cxx: str, nvcc: str | None, architectures: list[str]) -> str:
        def escape(path: object) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def quote(argument: str) -> str:
            return shlex.quote(argument).replace("$", "$$")

        kernels, ops = ROOT / "csrc" / "kernels", ROOT / "csrc" / "ops"
        # The checks in torch's headers keep __FILE__ in the library, which must not name the
        # folders of the build. If two match, the last one counts, and torch may be inside ours.
        folders = {Path(self.build_temp).resolve(): "build", ROOT: "gankernels", torch: "torch"}
        mapped = [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]
        common = "-std=c++17 -O3 -fPIC -Wall -Wextra -fvisibility=hidden "
        common += " ".join(map(quote, mapped))
        werror = "-Werror all-warnings" if os.environ.get("GANKERNELS_WERROR") == "1" else ""
        gencode = " ".join(f"-gencode {a}" for a in architectures)
        lines = [
            "ninja_required_version = 1.8",
            "rule kernel",
            # Kernels throw nothing. The baseline copy must run on every x86-64.
            f"  command = {cxx} {common} -fno-exceptions -fno-rtti $flags -MMD -MF $out.d "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule op",
            f"  command = {cxx} {common} -DTORCH_TARGET_VERSION=0x020a000000000000 $flags "
            f"-isystem {quote(str(torch / 'include'))} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        # Without --no-as-needed the linker would drop -ltorch, whose only use is to load others.
        link = f"-L{quote(str(torch / 'lib'))} -ltorch -ltorch_cpu"
        if nvcc:
            lines += [
                "rule cuda",
                "  command = rm -rf $out.kept && mkdir $out.kept && "
                f"{nvcc} -std=c++17 -O3 {gencode} {werror} --keep --keep-dir $out.kept "
                "-Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden "
                + " ".join(f"-Xcompiler {quote(m.replace(',', chr(92) + ','))}" for m in mapped)
                + " -MMD -MF $out.d -c $in -o $out && "
                "find $out.kept -type f ! -name '*.ptx' ! -name '*.cubin' -delete",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                # -nodlink: device code calls no other file's, and nvlink would record -L.
                f"  command = {nvcc} -shared -nodlink -cudart static -Xlinker --no-as-needed $in "
                f"{link} -o $out",
            ]
        else:
            lines += [
                "rule link",
                f"  command = {cxx} -shared -Wl,--no-as-needed $in {link} -o $out",
            ]
        objects = []

        def compile_(rule: str, source: Path, suffix: str = "", flags: str = "") -> None:
            # csrc/ops/adam.cpp becomes ops_adam.o, csrc/kernels/cpu/adam.cpp cpu_adam.avx2.o.
            parts = source.relative_to(ROOT / "csrc").with_suffix("").parts
            name = "_".join(part for part in parts if part != "kernels") + f"{suffix}.o"
            objects.append(name)
            lines.append(f"build {name}: {rule} {escape(source)}")
            if flags:
                lines.append(f"  flags = {flags}")

        # The largest first, to keep all cores busy to the end.
        for source in sorted((kernels / "cuda").rglob("*.cu")) if nvcc else []:
            compile_("cuda", source)
        for source in sorted((kernels / "cpu").rglob("*.cpp")):
            if source.stem == "dispatch":
                compile_("kernel", source)
                continue
            for isa, flags in CPU_ISAS.items():
                names = f"-DGK_ISA={isa}" + (" -DGK_BASELINE" if isa == "baseline" else "")
                compile_("kernel", source, f".{isa}", f"{names} {flags}")
        for source in sorted(ops.rglob("*.cpp")):
            compile_("op", source, flags="-DGK_WITH_CUDA" if nvcc else "")
        lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}"]
        return "\n".join(lines) + "\n"

    def output_folder(self) -> Path:
        return ROOT / "gankernels" if self.inplace else Path(self.build_lib) / "gankernels"

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "gankernels"
        return [str(folder / LIBRARY), str(folder / RECORD)]

    def get_output_mapping(self) -> dict[str, str]:
        return {
            output: str(ROOT / "gankernels" / Path(output).name) for output in self.get_outputs()
        }


class AnyPythonWheel(bdist_wheel):
    """One wheel for every Python 3 and torch >= 2.10: the library uses no Python symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # Only the library's name: BuildLibrary finds the sources.
    ext_modules=[Extension("gankernels.libgankernels", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
