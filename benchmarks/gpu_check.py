"""Runs all checks that need an NVIDIA GPU, in under ten minutes: `make gpu-check`.

Builds the kernels in place, or tests a wheel (WHEEL=path), in stages with a time limit each: the
environment; the CPU tests on CUDA; CUDA graphs, streams and torch.compile; compute-sanitizer's
memcheck, racecheck, synccheck and initcheck; benchmarks of the kernels and of whole training
iterations. Tests run in parallel, and so do the sanitizer's tools; benchmarks run alone. If a stage
fails, the next ones still run, and the exit status reports the failure. The table is printed; the
figures as JSON, and a log of all output, are written to $OUT or to benchmarks/results. Nothing is
installed: missing packages are listed, and the checks that need them are skipped.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "benchmarks" / "gpu_ops.py"
TRAINING = ROOT / "benchmarks" / "training.py"

# Missing packages are not installed, because the machine may have no network.
OPTIONAL = {
    "pytest": "no test can run",
    "hypothesis": "tests of any input are skipped",
    "expecttest": "PyTorch's own sample inputs are skipped",
    "xdist": "tests run one after another, and may run out of time",
    "triton": "torch.compile cannot be tested or compared with",
}

ENVIRONMENT = """
import json, platform, torch, gankernels as gk
info = gk.build_info()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
    "gankernels": info,
}))
assert info["cuda_in_use"], info["cuda_off_because"]
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "device": p.name, "capability": f"{p.major}.{p.minor}",
    "multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory,
    "l2_bytes": p.L2_cache_size,
}))
"""


@dataclass(frozen=True)
class Stage:
    """A command, its time limit in seconds, and a text that its output must contain."""

    name: str
    command: Sequence[object]
    budget: float
    must_say: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    skip_because: str = ""
    together: str = ""  # adjacent stages with the same word run at the same time


@dataclass
class Result:
    name: str
    status: str  # "passed", "failed", "timed out" or "skipped"
    seconds: float
    note: str = ""
    output: str = field(default="", repr=False)


# ---- stages ------------------------------------------------------------------------------------


def run_stage(stage: Stage, folder: Path) -> Result:
    """Runs a stage with the package in `folder`, and ends its processes at the time limit."""
    if stage.skip_because:
        return Result(stage.name, "skipped", 0.0, stage.skip_because)
    begin = time.monotonic()
    imports = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": imports, "PATH": search_path()}
    try:
        process = subprocess.Popen(
            [str(part) for part in stage.command],
            cwd=folder,
            env={**os.environ, **own, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Result(stage.name, "failed", time.monotonic() - begin, str(error))
    try:
        output, _ = process.communicate(timeout=stage.budget)
        late = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        late = True
    seconds = time.monotonic() - begin
    if late:
        return Result(stage.name, "timed out", seconds, f"after {stage.budget:.0f} s", output)
    if process.returncode:
        note = f"exit status {process.returncode}: {last_line(output)}".rstrip(": ")
        return Result(stage.name, "failed", seconds, note, output)
    if not re.search(stage.must_say, output):
        return Result(stage.name, "failed", seconds, f"no {stage.must_say!r} in its output", output)
    return Result(stage.name, "passed", seconds, last_line(output), output)


def last_line(output: str) -> str:
    lines = output.strip().splitlines()
    line = lines[-1].strip("= ") if lines else ""
    return "" if line.startswith("{") else line[:100]


def stages(wheel: bool) -> list[Stage]:
    """Returns all stages. Their limits, counting parallel ones once, total under ten minutes."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT]
    tests += ["-c", ROOT / "pyproject.toml", "-m", "cuda"]
    parallel = ["-n", "8"] if has("xdist") else []
    same = [ROOT / "tests" / part for part in ("ops", "nn", "functional")]
    on_cuda = ["--device", "cuda", "--models", "keras cgan,wgan_gp"]
    on_cuda += ["--rounds", "2", "--seconds", "2", "--warm-up", "1", "--json"]
    no_pillow = "" if has("PIL") else "Pillow is not installed"
    no_pytest = "" if has("pytest") else "pytest is not installed"
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    # Without PyTorch's cache every tensor is an allocation of its own, with bounds to overstep.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitizer(tool: str, must_say: str) -> Stage:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":  # torch asks for driver functions that are not there, and goes on
            command += ["--report-api-errors", "no"]
        found = shutil.which(command[0], path=search_path())
        skip = "" if found else "compute-sanitizer is not on the PATH"
        command[0] = found or command[0]
        command += [python, OPS, "--once"]
        return Stage(tool, command, 110, must_say, separate, skip, "sanitizers")

    return [
        Stage("build", build, 90, "", build_settings(), "a wheel was given" if wheel else ""),
        Stage("environment", [python, "-c", ENVIRONMENT], 20),
        Stage("tests", [*tests, *parallel, *same], 190, r"\d passed", {}, no_pytest, "tests"),
        Stage(
            "graphs, streams, compile",
            [*tests, ROOT / "tests" / "cuda"], 190, r"\d passed", {}, no_pytest, "tests",
        ),
        sanitizer("memcheck", "ERROR SUMMARY: 0 errors"),
        sanitizer("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        sanitizer("synccheck", "ERROR SUMMARY: 0 errors"),
        sanitizer("initcheck", "ERROR SUMMARY: 0 errors"),
        Stage("benchmarks", [python, OPS], 110),
        Stage("training", [python, TRAINING, *on_cuda], 75, "keras cgan", {}, no_pillow),
    ]  # fmt: skip


def search_path() -> str:
    """Returns PATH, followed by the usual folders of the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(toolkit)])


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def nvidia_smi(query: str) -> str:
    """Returns the name that the driver reports, or "unknown"."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# The oldest driver that runs a toolkit's programs, by the toolkit's major version.
DRIVERS = {"12": 525, "13": 580}


def cuda_version(wheel: Path | None) -> str | None:
    """Returns the version of the toolkit that the kernels are built with."""
    if wheel:
        archive, record = zipfile.ZipFile(wheel), "gankernels/_build.json"
        return json.loads(archive.read(record))["cuda"] if record in archive.namelist() else None
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc", path=search_path())
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", output)
    return found and found[1]


def opening(wheel: Path | None) -> str:
    """Returns the first line: the package, the GPU, and whether the driver is new enough."""
    driver, cuda = nvidia_smi("driver_version"), cuda_version(wheel)
    line = f"{nvidia_smi('name')}, driver {driver}, kernels of CUDA {cuda}"
    needed = DRIVERS.get((cuda or "").split(".")[0])
    if needed and driver.split(".")[0].isdecimal() and int(driver.split(".")[0]) < needed:
        line += f", WHICH NEED DRIVER {needed} OR NEWER: all of them will run as plain PyTorch"
    return line


def build_settings() -> dict[str, str]:
    """Builds the CUDA kernels, by default for this GPU only."""
    capability = nvidia_smi("compute_cap")
    settings = {"GANKERNELS_CUDA": "1"}
    if capability != "unknown" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        settings["TORCH_CUDA_ARCH_LIST"] = capability
    return settings


# ---- report ------------------------------------------------------------------------------------


def records(output: str) -> list[dict]:
    """Yields the JSON objects among the lines, except incomplete ones."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def assess(row: dict, bandwidth: float | None, additions: float | None) -> dict:
    """Adds shares of the ceilings, ratios and the verdict to a row."""
    seconds = row["seconds"].get("ours")
    shares = {"bandwidth": None, "moved_bandwidth": None, "additions": None, "launches": None}
    if seconds:
        if row["bytes"] and bandwidth:
            shares["bandwidth"] = row["bytes"] / seconds / bandwidth
            shares["moved_bandwidth"] = row["moved_bytes"] / seconds / bandwidth
        if row["additions"] and additions:
            shares["additions"] = row["additions"] / seconds / additions
    shares["launches"] = row["launches"]
    ratios = {
        f"times_{name}": row["seconds"][name] / seconds
        for name in ("eager", "compiled")
        if seconds and name in row["seconds"]
    }
    met = None
    if row["bar"]:
        kind, wanted = row["bar"]
        value = shares[kind]
        if value is not None:
            met = value <= wanted if kind == "launches" else value >= wanted
    return {**row, "shares": shares, **ratios, "bar_met": met}


COLUMNS = ("op", "pass", "shape", "dtype", "layout", "time", "work", "of ceiling", "bar")
COLUMNS += ("x eager", "x compiled")


def cells(row: dict) -> list[str]:
    """Formats an assessed row for the table."""
    seconds, shares = row["seconds"].get("ours"), row["shares"]
    work = reached = bar = ""
    if row["additions"]:
        work = f"{row['additions'] / 1e9:.3g} Gadd"
        if shares["additions"] is not None:
            reached = f"{shares['additions']:.0%} FADD"
    elif row["bytes"]:
        work = f"{row['bytes'] / 1e6:.4g} MB"
        if shares["bandwidth"] is not None:
            reached = f"{shares['bandwidth']:.0%} copy"
            if row["moved_bytes"] != row["bytes"]:
                reached += f", {shares['moved_bandwidth']:.0%} moved"
    if row["bar"]:
        kind, wanted = row["bar"]
        if kind == "launches":
            bar = f"{wanted} launch"
            reached = "" if shares["launches"] is None else f"{shares['launches']} launched"
        else:
            bar = f"{wanted:.0%}"
        bar += {True: "", False: " !", None: " ?"}[row["bar_met"]]

    def ratio(name: str) -> str:
        if name in row["errors"]:
            return "failed"
        return f"{row[f'times_{name}']:.1f}" if f"times_{name}" in row else ""

    shape = "x".join(map(str, row["shape"]))
    time = "failed" if seconds is None else f"{seconds * 1e6:.1f} us"
    layout = row["layout"] if len(row["shape"]) > 2 and not row["additions"] else ""
    return [
        row["op"], row["what"], shape, row["dtype"], layout, time, work, reached, bar,
        ratio("eager"), ratio("compiled"),
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in text)


def report(results: list[Result]) -> dict:
    """Returns all results as they are written to JSON."""
    by_name = {result.name: result for result in results}
    environment: dict = {"driver": nvidia_smi("driver_version"), "date": now()}
    for record in records(by_name["environment"].output) if "environment" in by_name else []:
        environment |= record
    environment["missing"] = {name: why for name, why in OPTIONAL.items() if not has(name)}
    ceilings: dict = {}
    rows = []
    for record in records(by_name["benchmarks"].output) if "benchmarks" in by_name else []:
        if "row" in record:
            rows.append(record["row"])
        else:
            ceilings |= record
    training = records(by_name["training"].output) if "training" in by_name else []
    bandwidth = ceilings.get("copy_bytes_per_second")
    additions = ceilings.get("additions", {}).get("adds_per_second")
    return {
        "environment": environment,
        "stages": [
            {k: v for k, v in asdict(result).items() if k != "output"} for result in results
        ],
        "ceilings": ceilings,
        "rows": [assess(row, bandwidth, additions) for row in rows],
        "training": [record["row"] for record in training],
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe(found: dict) -> str:
    """Returns the lines of the report."""
    environment, ceilings = found["environment"], found["ceilings"]
    parts = [environment.get("device", "no device"), f"driver {environment['driver']}"]
    parts += [f"torch {environment.get('torch', 'unknown')}", environment["date"]]
    lines = [", ".join(parts)]
    lines += [f"not installed: {name}: {why}" for name, why in environment["missing"].items()]
    if "copy_bytes_per_second" in ceilings:
        lines.append(f"copy bandwidth {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    if "additions" in ceilings:
        rate = ceilings["additions"]
        lines.append(
            f"additions {rate['adds_per_second'] / 1e12:.2f} T/s at {rate['clock_hz'] / 1e9:.2f} "
            f"GHz ({rate['how']})"
        )
    if found["rows"]:
        lines += ["", table(found["rows"]), "", "!: below the bar   ?: not measured"]
        lines += ["copy: fewest bytes possible   moved: those that the kernels move"]
        for row in found["rows"]:
            name = f"{row['op']} {row['what']} {tuple(row['shape'])}"
            lines += [f"{name}, {which}: {why}" for which, why in row["errors"].items()]
    for row in found["training"]:
        bar = "" if row["bar"] is None else f" (bar {row['bar']:g}{'' if row['met'] else ' !'})"
        times = "" if row["times_script"] is None else f", {row['times_script']:.1f}x PyTorch-GAN's"
        lines.append(f"{row['model']}, {row['contender']}: {row['it_per_s']:.0f} it/s{times}{bar}")
    lines.append("")
    for stage in found["stages"]:
        lines.append(
            f"{stage['name']:26} {stage['status']:10} {stage['seconds']:6.1f} s  {stage['note']}"
        )
    return "\n".join(lines)


def run_all(planned: Sequence[Stage], folder: Path, log: Path) -> list[Result]:
    """Runs every stage, even if earlier ones fail."""
    results = []
    with log.open("w") as file, ThreadPoolExecutor(len(planned) or 1) as pool:
        for group in groups(planned):
            print(f"gpu-check: {'; '.join(stage.name for stage in group)} ...", flush=True)
            for result in pool.map(lambda stage: run_stage(stage, folder), group):
                file.write(f"==== {result.name}: {result.status}\n{result.output}\n")
                file.flush()
                if result.status in ("failed", "timed out"):
                    print(f"gpu-check: {result.name} {result.status}: {result.note}")
                    print("\n".join(result.output.splitlines()[-25:]), flush=True)
                results.append(result)
    return results


def groups(planned: Sequence[Stage]) -> list[list[Stage]]:
    """Groups the stages that run at the same time, in order."""
    numbered = itertools.groupby(enumerate(planned), lambda at: at[1].together or at[0])
    return [[stage for _, stage in group] for _, group in numbered]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="wheel to test (default: build in place)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
        help="folder of the results (default: $OUT or benchmarks/results)",
    )
    arguments = parser.parse_args(argv)
    if nvidia_smi("name") == "unknown" and not Path("/dev/nvidiactl").exists():
        print("gpu-check: there is no NVIDIA GPU here, or nvidia-smi does not find it")
        return 1
    print(f"gpu-check: {opening(arguments.wheel)}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out.resolve() / "gpu_check.log"
    with tempfile.TemporaryDirectory() as unpacked:
        # Whose package is imported: the wheel's, or the one built in place.
        folder = ROOT
        if arguments.wheel:
            zipfile.ZipFile(arguments.wheel).extractall(unpacked)
            folder = Path(unpacked)
        results = run_all(stages(bool(arguments.wheel)), folder, log)
    found = report(results)
    path = arguments.out / "gpu_check.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{describe(found)}\n\n{path}\n{log}")
    return int(any(result.status in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    sys.exit(main())
