"""Every op on a GPU: one pass at a time against the roofline, whole steps against PyTorch.

``python benchmarks/gpu_ops.py`` measures and prints one JSON object per line, so that what is done
is kept where time runs out: first the ceilings, then a row for every case. Each op has a process of
its own, since an error of a kernel leaves nothing behind that could measure others. ``--once`` runs
each kernel once on small shapes, for compute-sanitizer. gpu_check.py calls both and makes the
table.

Times are those of CUDA graphs of many calls, for all contenders alike: launches by the host, which
depend on the host, are no part of them. What fits into L2 stays there from call to call.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import gankernels as gk
from gankernels.ops import minibatch_stddev as stddev

Run = Callable[[], object]
_ops = torch.ops.gankernels

CEILINGS = "ceilings"
SLOPE, EPS = 0.2, 1e-5
LARGE = 256 << 20  # bytes of a tensor from which on no cache helps
LAUNCH_BOUND = 1 << 20  # bytes of a tensor that a launch costs more than

# Tensors of the input's size that a pass has to read and write, were each read once; and those that
# the kernels do read and write where a tensor fits no cache. Broadcasts and sums count nothing.
TENSORS = {
    ("batch_norm_leaky_relu", "forward"): (2, 3),
    ("batch_norm_leaky_relu", "backward"): (3, 5),
    ("batch_norm_leaky_relu", "double backward"): (5, 8),
    ("gradient_norm_penalty", "forward"): (1, 1),
    ("gradient_norm_penalty", "backward"): (2, 2),
    ("gradient_norm_penalty", "double backward"): (3, 5),
    ("interpolate", "forward"): (3, 3),
    ("minibatch_stddev", "forward"): (1, 1),
    ("minibatch_stddev", "backward"): (2, 2),
    ("minibatch_stddev", "double backward"): (3, 3),
}
# Float32 additions of minibatch discrimination to an ordered pair and dimension, some of them fused
# with a sign: the difference and the distance; in the derivatives the signed sum of weights; in the
# second one also the tangent's difference and signed sum.
ADDITIONS = {"forward": 2, "backward": 3, "double backward": 5}


@dataclass(frozen=True)
class Case:
    op: str
    what: str  # "forward", "backward", "double backward": one kernel pass; else a whole step
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def is_step(self) -> bool:
        return self.what in ("forward + backward", "penalty step")

    @property
    def compiled(self) -> bool:
        """Whether torch.compile takes part, which needs some ten seconds to get ready."""
        large = self.input_bytes > LAUNCH_BOUND
        return self.is_step and self.dtype is torch.float32 and large

    @property
    def input_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes(self) -> int | None:
        """The fewest that the pass can move."""
        tensors = TENSORS.get((self.op, self.what))
        return tensors and tensors[0] * self.input_bytes

    @property
    def moved_bytes(self) -> int | None:
        """Those that the kernels move where nothing stays in a cache."""
        tensors = TENSORS.get((self.op, self.what))
        return tensors and tensors[1] * self.input_bytes

    @property
    def additions(self) -> int | None:
        if self.op != "minibatch_discrimination" or self.is_step:
            return None
        n, b, c = self.shape
        return ADDITIONS[self.what] * n * (n - 1) * b * c

    @property
    def bar(self) -> tuple[str, float] | None:
        """What is wanted: a share of a ceiling, or a number of launches at most."""
        if self.is_step:
            return None
        if self.op == "minibatch_discrimination":
            return ("additions", 0.7) if self.what == "forward" and self.shape[2] >= 16 else None
        if self.input_bytes >= LARGE:
            return ("bandwidth", 0.9)
        return ("launches", 1) if self.input_bytes <= LAUNCH_BOUND else None


def cases() -> Iterator[Case]:
    passes = ("forward", "backward", "double backward")
    f32, bf16 = torch.float32, torch.bfloat16
    layouts = ("contiguous", "channels_last")
    for shape, dtypes in (
        ((64, 128, 128, 128), (f32, bf16)),
        ((64, 128, 32, 32), (f32, bf16)),
        ((64, 256), (f32,)),
    ):
        for dtype in dtypes:
            for layout in layouts if len(shape) > 2 else layouts[:1]:
                for what in passes:
                    yield Case("batch_norm_leaky_relu", what, shape, dtype, layout)
    for shape in ((128, 100, 5), (512, 100, 16), (1024, 100, 32), (4096, 32, 16), (1024, 32, 64)):
        for what in passes:
            yield Case("minibatch_discrimination", what, shape)
    for shape in ((64, 784), (64, 3, 64, 64), (256, 3, 512, 512)):
        for what in passes:
            yield Case("gradient_norm_penalty", what, shape)
    yield Case("interpolate", "forward", (256, 3, 512, 512))
    for shape in ((64, 512, 4, 4), (64, 64, 128, 128)):
        for what in passes:
            yield Case("minibatch_stddev", what, shape)
    for what in ("forward + backward", "penalty step"):
        for dtype in (f32, bf16):
            for layout in layouts:
                yield Case("batch_norm_leaky_relu", what, (64, 128, 32, 32), dtype, layout)
        yield Case("batch_norm_leaky_relu", what, (64, 1024))
    for shape in ((128, 100, 5), (512, 100, 16)):
        yield Case("minibatch_discrimination", "forward + backward", shape)
    yield Case("minibatch_stddev", "forward + backward", (64, 512, 4, 4))
    yield Case("minibatch_stddev", "penalty step", (64, 512, 4, 4), bf16)


def small_cases() -> Iterator[Case]:
    """Through every kernel and its ways of dividing work, with elements left over at all ends."""
    passes = ("forward", "backward", "double backward")
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for what in passes:
        for dtype in dtypes:
            for shape in ((5, 6, 4, 4), (3, 5, 7), (4, 3, 96, 97), (37, 40)):
                yield Case("batch_norm_leaky_relu", what, shape, dtype)
            for shape in ((5, 6, 4, 4), (3, 5, 7, 3), (60, 130, 9, 9)):
                yield Case("batch_norm_leaky_relu", what, shape, dtype, "channels_last")
            for c in (2, 4, 5, 8, 12, 16, 24, 32, 40):
                yield Case("minibatch_discrimination", what, (70, 3, c), dtype)
            for shape in ((3, 43), (2, 40_001), (40, 8)):
                yield Case("gradient_norm_penalty", what, shape, dtype)
            for shape in (
                (7, 4, 3, 3),
                (6, 3, 5),
                (4, 2, 70, 70),
                (4, 3, 53, 53),
                (17, 36),
                (9, 7),
            ):
                yield Case("minibatch_stddev", what, shape, dtype)
    yield Case("interpolate", "forward", (5, 3, 7))


# ---- what is run -------------------------------------------------------------------------------


def contenders(
    case: Case, device: str = "cuda", *, drawn_on: str | None = None, compiled: bool = False
) -> dict[str, Run]:
    """Ours; eager PyTorch's where it has the same pass; compiled PyTorch's where asked for."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = (torch.randn(shape, device=drawn_on or device) * scale).to(case.dtype)
        if case.layout == "channels_last":
            drawn = drawn.movedim(1, -1).contiguous().movedim(-1, 1)
        return drawn.to(device)

    torch.manual_seed(0)
    return _MAKERS[case.op](case, draw, compiled)


def _batch_norm(case: Case, draw: Callable[..., Tensor], compiled: bool) -> dict[str, Run]:
    x, g = draw(*case.shape), draw(*case.shape)
    channels = case.shape[1]
    wide = torch.promote_types(case.dtype, torch.float32)  # as of a layer under autocast
    weight, bias = torch.ones(channels, dtype=wide), torch.zeros(channels, dtype=wide)
    weight, bias = weight.to(x.device), bias.to(x.device)
    last = (EPS, SLOPE, False)

    def forward() -> tuple[Tensor, Tensor]:
        return _ops.batch_norm_leaky_relu(x, weight, bias, None, *last)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True, eps=EPS), SLOPE)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return gk.functional.batch_norm_leaky_relu(
            x, None, None, weight, bias, True, eps=EPS, negative_slope=SLOPE
        )

    if case.is_step:
        step = _penalty_step if case.what == "penalty step" else _first_step
        return step(ours, eager, (x, weight), g, compiled)
    if case.what == "forward":
        return {"ours": forward, "eager": lambda: eager(x, weight)}
    statistics = forward()[1]
    options = (x.numel() // channels, True, *last, True)
    first = (g, x, weight, bias, statistics, None, *options)
    if case.what == "backward":
        return {"ours": lambda: _ops.batch_norm_leaky_relu_backward(*first)}
    v = draw(*case.shape)
    return {"ours": lambda: _ops.batch_norm_leaky_relu_double_backward(v, None, None, *first, True)}


def _discrimination(case: Case, draw: Callable[..., Tensor], compiled: bool) -> dict[str, Run]:
    n, b, c = case.shape
    m, o, v = draw(n, b, c, scale=2 / c), draw(n, b), draw(n, b, c)

    def broadcasting(m: Tensor) -> Tensor:
        return torch.exp(-(m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)).sum(0) - 1

    fits = n * n * b * c <= 1 << 30
    if case.is_step:
        return _first_step(gk.functional.minibatch_discrimination, broadcasting, (m,), o, compiled)
    if case.what == "forward":
        runs: dict[str, Run] = {"ours": lambda: _ops.minibatch_discrimination(m)}
        return runs | ({"eager": lambda: broadcasting(m)} if fits else {})
    if case.what == "backward":
        return {"ours": lambda: _ops.minibatch_discrimination_backward(o, m)}
    return {"ours": lambda: _ops.minibatch_discrimination_double_backward(v, o, m, True)}


def _penalty(case: Case, draw: Callable[..., Tensor], compiled: bool) -> dict[str, Run]:
    grad, tangent = draw(*case.shape), draw(*case.shape)
    two_sided, center = 0, 1.0
    norms = _ops.gradient_norm_penalty(grad, two_sided, center)[1]
    given = (torch.ones(()).to(norms), grad, norms, two_sided, center)
    if case.what == "forward":
        return {
            "ours": lambda: _ops.gradient_norm_penalty(grad, two_sided, center),
            "eager": lambda: _eager_penalty(grad),
        }
    if case.what == "backward":
        return {"ours": lambda: _ops.gradient_norm_penalty_backward(*given)}
    return {"ours": lambda: _ops.gradient_norm_penalty_double_backward(tangent, *given)}


def _interpolate(case: Case, draw: Callable[..., Tensor], compiled: bool) -> dict[str, Run]:
    real, fake = draw(*case.shape), draw(*case.shape)
    alpha = torch.rand(case.shape[0]).to(real)
    factor = alpha.view(-1, *(1,) * (real.dim() - 1))
    return {
        "ours": lambda: gk.functional.interpolate(real, fake, alpha),
        "eager": lambda: factor * real + (1 - factor) * fake,
    }


def _stddev(case: Case, draw: Callable[..., Tensor], compiled: bool) -> dict[str, Run]:
    x, tangent = draw(*case.shape), draw(*case.shape)
    group_size = 4 if x.dim() > 2 else 8  # of which the kernels hold the members, and do not
    options = (group_size, 1, stddev.EPS)

    def ours(x: Tensor) -> Tensor:
        return gk.functional.minibatch_stddev(x, group_size)

    def eager(x: Tensor) -> Tensor:
        return stddev.reference(x, group_size, 1)

    if case.is_step:
        step = _penalty_step if case.what == "penalty step" else _first_step
        return step(ours, eager, (x,), draw(case.shape[0], 1, *case.shape[2:]), compiled)
    if case.what == "forward":
        return {"ours": lambda: _ops.minibatch_stddev(x, *options), "eager": lambda: eager(x)}
    first = (_ops.minibatch_stddev(x, *options), x, *options)
    if case.what == "backward":
        return {"ours": lambda: _ops.minibatch_stddev_backward(*first)}
    return {"ours": lambda: _ops.minibatch_stddev_double_backward(tangent, *first)}


_MAKERS = {
    "batch_norm_leaky_relu": _batch_norm,
    "minibatch_discrimination": _discrimination,
    "gradient_norm_penalty": _penalty,
    "interpolate": _interpolate,
    "minibatch_stddev": _stddev,
}


def _eager_penalty(grad: Tensor) -> Tensor:
    return (grad.flatten(1).float().norm(2, 1) - 1).square().mean()


def _first_step(
    ours: Callable, eager: Callable, inputs: tuple[Tensor, ...], g: Tensor, compiled: bool
) -> dict[str, Run]:
    """Forward and backward."""
    leaves = [t.clone().requires_grad_() for t in inputs]

    def run(function: Callable) -> Run:
        return lambda: torch.autograd.grad(function(*leaves), leaves, g)

    runs = {"ours": run(ours), "eager": run(eager)}
    return runs | ({"compiled": run(torch.compile(eager))} if compiled else {})


def _penalty_step(
    ours: Callable, eager: Callable, inputs: tuple[Tensor, ...], g: Tensor, compiled: bool
) -> dict[str, Run]:
    """Forward, backward, the penalty on dx, double backward."""
    leaves = [t.clone().requires_grad_() for t in inputs]

    def run(function: Callable, penalty: Callable) -> Run:
        def step() -> tuple[Tensor, ...]:
            (dx,) = torch.autograd.grad(function(*leaves), leaves[0], g, create_graph=True)
            return torch.autograd.grad(penalty(dx), leaves)

        return step

    runs = {
        "ours": run(ours, gk.functional.gradient_norm_penalty),
        "eager": run(eager, _eager_penalty),
    }
    if compiled:
        # A compiled module cannot be differentiated twice; a whole step with torch.func inside can.
        def penalised(*inputs: Tensor) -> Tensor:
            dx = torch.func.grad(lambda x: (eager(x, *inputs[1:]) * g).sum())(inputs[0])
            return _eager_penalty(dx)

        program = torch.compile(torch.func.grad(penalised, argnums=tuple(range(len(inputs)))))
        runs["compiled"] = lambda: program(*inputs)
    return runs


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
    """The median time of a call in a graph of as many as take `span` seconds."""

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
    """How many kernels a call starts; None where the profiler sees none at all."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels) or None


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy too large for any cache."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds_of(lambda: y.copy_(x))


def addition_rate() -> dict:
    """What fadd_rate.cu measures; without nvcc the formula, multiprocessors x 128 x clock."""
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
    row |= {"bar": case.bar, "launches": None, "seconds": {}, "errors": {}}
    name = "ours"
    try:
        for name, run in contenders(case, compiled=case.compiled).items():
            row["seconds"][name] = seconds_of(run)
            if name == "ours" and case.bar and case.bar[0] == "launches":
                row["launches"] = launches_of(run)
        torch.cuda.empty_cache()
    except Exception as error:  # for want of memory, say: other rows are measured all the same
        row["errors"][name] = f"{type(error).__name__}: {error}"
    return row


def measure_apart(ops: Sequence[str]) -> int:
    """Runs this script for the ceilings and for each op; the exit status of the worst."""
    commands = [[sys.executable, __file__, "--only", name] for name in (CEILINGS, *ops)]
    return max(abs(subprocess.run(command).returncode) for command in commands)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="small shapes, once, untimed")
    parser.add_argument("--only", default="", help=f"one op, or {CEILINGS!r}, in this process")
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
        sys.exit(measure_apart(list(_MAKERS)))
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
