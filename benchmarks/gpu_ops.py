"""Measures every op on a GPU: single passes against the roofline, whole steps against PyTorch.

``python benchmarks/gpu_ops.py`` measures and prints one JSON object per line, so that
results are kept if time runs out: first the ceilings, then a row for each case. Each op has its own
process, since no other kernel can be measured after an error of one. ``--once`` runs each kernel
once on small shapes, for compute-sanitizer. gpu_check.py calls both and makes the table.

Times are those of CUDA graphs of many calls, for all contenders, so that they do not contain
launches by the host. Tensors that fit in L2 stay there from call to call.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import gankernels as gk
from gankernels import bench
from gankernels.bench.ops import LARGEST_BROADCAST, OPS, Case, expand
from gankernels.bench.timing import Run
from gankernels.ops.record import KERNEL_PASSES, Draw

CEILINGS = "ceilings"
LARGE = 256 << 20  # bytes of a tensor from which on no cache helps
LAUNCH_BOUND = 1 << 20  # bytes of a tensor that a launch costs more than


def bar(case: Case) -> tuple[str, float] | None:
    """A goal: a share of a ceiling, or the largest number of launches."""
    if case.is_step:
        return None
    if case.additions is not None:
        return ("additions", 0.7) if case.what == "forward" and case.shape[2] >= 16 else None
    if case.input_bytes >= LARGE:
        return ("bandwidth", 0.9)
    return ("launches", 1) if case.input_bytes <= LAUNCH_BOUND else None


def with_compiler(case: Case) -> bool:
    """Whether to measure torch.compile, which takes about ten seconds to compile."""
    large = case.input_bytes > LAUNCH_BOUND
    return case.is_step and case.dtype is torch.float32 and large


def measured_ops() -> list[str]:
    return [name for name, op in OPS.items() if op.measured_on_gpu]


def cases() -> Iterator[Case]:
    for name in measured_ops():
        yield from expand(name, OPS[name].measured_on_gpu)


def small_cases() -> Iterator[Case]:
    """Runs every kernel and every way of dividing its work, with incomplete blocks at all ends."""
    for name in measured_ops():
        op = OPS[name]
        if op.fused is None:
            yield Case(name, "forward", op.samples[0])
            continue
        for what in KERNEL_PASSES:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for shape in op.samples:
                    yield Case(name, what, shape, dtype)
                for shape in op.channels_last_samples:
                    yield Case(name, what, shape, dtype, "channels_last")


def contenders(
    case: Case, device: str = "cuda", *, drawn_on: str | None = None, compiled: bool = False
) -> dict[str, Run]:
    """Returns ours; eager PyTorch if it has the same pass; compiled PyTorch on request."""
    if case.is_step:
        runs = bench.contenders(case, device, compiled=compiled, layers=False, drawn_on=drawn_on)
        return {name: runs[name] for name in ("ours", "eager", "compiled") if name in runs}
    torch.manual_seed(0)
    op, draw = OPS[case.op], Draw(case.dtype, device, case.layout, drawn_on)
    inputs = op.inputs(case.shape, draw)
    if op.fused is None:
        ours: Run = lambda: op.public(gk, *inputs)  # noqa: E731
    else:
        ours = op.kernel_passes(case.shape, draw, inputs)[case.what]
    fits = op.eager_elements is None or op.eager_elements(case.shape) <= LARGEST_BROADCAST
    if case.what == "forward" and fits:
        return {"ours": ours, "eager": lambda: op.eager(*inputs)}
    return {"ours": ours}


# ---- how it is measured ------------------------------------------------------------------------


def graph_of(run: Run, calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def seconds_of(run: Run, *, span: float = 4e-3, replays: int = 15) -> float:
    """Returns the median time of a call, in a graph of calls that takes `span` seconds."""

    def once(graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    graph = graph_of(run, 1)
    once(graph)
    calls = max(1, min(200, int(span / once(graph))))
    if calls > 1:
        graph = graph_of(run, calls)
        once(graph)
    return statistics.median(once(graph) for _ in range(replays)) / calls


def launches_of(run: Run) -> int | None:
    """Counts the kernels that a call launches; None if the profiler sees none."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels) or None


def copy_bandwidth() -> float:
    """Measures the bytes per second, reads plus writes, of a copy larger than all caches."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x))


def addition_rate() -> dict:
    """Runs fadd_rate.cu; without nvcc, returns multiprocessors x 128 x clock."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i0"]
        answer = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        clock = float(answer) * 1e6
        how = "no nvcc: by the formula, with the highest clock"
        return {"adds_per_second": count * 128 * clock, "clock_hz": clock, "how": how}
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fadd_rate"
        source = Path(__file__).parent / "fadd_rate.cu"
        command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-o", program, source]
        subprocess.run(command, check=True)
        result = subprocess.run([program], check=True, capture_output=True, text=True)
    return json.loads(result.stdout) | {"how": "measured by fadd_rate.cu"}


def measure(case: Case) -> dict:
    row = asdict(case) | {"dtype": str(case.dtype).removeprefix("torch."), "shape": case.shape}
    row |= {"bytes": case.bytes, "moved_bytes": case.moved_bytes, "additions": case.additions}
    row |= {"bar": bar(case), "launches": None, "seconds": {}, "errors": {}}
    name = "ours"
    try:
        for name, run in contenders(case, compiled=with_compiler(case)).items():
            row["seconds"][name] = seconds_of(run)
            if name == "ours" and row["bar"] and row["bar"][0] == "launches":
                row["launches"] = launches_of(run)
        torch.cuda.empty_cache()
    except Exception as error:  # such as too little memory: other rows are measured anyway
        row["errors"][name] = f"{type(error).__name__}: {error}"
    return row


def measure_apart(ops: Sequence[str]) -> int:
    """Runs this script for the ceilings and for each op, and returns the worst exit status."""
    commands = [[sys.executable, __file__, "--only", name] for name in (CEILINGS, *ops)]
    return max(abs(subprocess.run(command).returncode) for command in commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="run small shapes once, without timing")
    parser.add_argument(
        "--only", default="", help=f"measure one op, or {CEILINGS!r}, in this process"
    )
    arguments = parser.parse_args()
    if arguments.once:
        count = 0
        for case in small_cases():
            if arguments.only in ("", case.op):
                # Of CUDA kernels only our own run.
                contenders(case, drawn_on="cpu")["ours"]()
                count += 1
        torch.cuda.synchronize()
        print(f"ran {count} cases")
        return
    if not arguments.only:
        sys.exit(measure_apart(measured_ops()))
    if arguments.only == CEILINGS:
        print(json.dumps({"copy_bytes_per_second": copy_bandwidth()}), flush=True)
        print(json.dumps({"additions": addition_rate()}), flush=True)
        return
    failed = 0
    for case in cases():
        if arguments.only == case.op:
            row = measure(case)
            failed += "ours" in row["errors"]
            print(json.dumps({"row": row}), flush=True)
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
