"""The CUDA kernels of minibatch_stddev, on the emulated device, against float64 autograd.

A block of 512 threads takes a part of a cell, the positions of one group and feature. A part has at
least 8192 positions; from there on a device's multiprocessors, 1, 4 or 132 with four blocks each,
decide into how many parts a cell is divided.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from .problem import COMPUTED, DTYPES, ROUNDING, to_numpy

# Under the sanitizers, which do not look at the values, one order is enough.
SEEDS = (0,) if "GANKERNELS_EMULATION" in os.environ else (0, 1, 2)


@dataclass(frozen=True)
class Problem:
    n: int = 6
    groups: int = 2
    rows: int = 1
    features: int = 1
    run: int = 16
    dtype: str = "float32"
    eps: float = 1e-8
    mean: float = 0.5
    std: float = 1.0
    misalignment: int = 0  # of inputs, in elements
    output_misalignment: int = 0
    device: int = 1

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def options(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("mean", "std")}

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Problem, k))
        return "-".join(changed) or "default"


class Solution:
    """Random inputs, quantised to their types, and every result by its name in the kernels."""

    def __init__(self, p: Problem):
        self.p = p
        generator = torch.Generator().manual_seed(0)
        shape = (p.n, p.rows, p.features, p.run)

        def random(*shape, dtype, scale=1.0, offset=0.0):
            value = offset + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.to(DTYPES[dtype]).double()

        self.x = random(*shape, dtype=p.dtype, scale=p.std, offset=p.mean)
        self.tangent = random(*shape, dtype=p.dtype)
        self.grad_stddev = random(p.groups, p.features, dtype=p.accumulator)

        x, outer = self.x.clone().requires_grad_(), self.grad_stddev.clone().requires_grad_()
        # Around a member, or float64 would not hold small deviations much better than the kernels.
        groups = [x[g :: p.groups] - self.x[g] for g in range(p.groups)]
        sigmas = [(y.var(0, correction=0) + p.eps).sqrt() for y in groups]
        self.stddev = torch.stack([sigma.mean((0, 2)) for sigma in sigmas])
        (self.grad_x,) = torch.autograd.grad(self.stddev, x, outer, create_graph=True)
        scalar = (self.grad_x * self.tangent).sum()
        self.grad_grad_stddev, self.second = torch.autograd.grad(scalar, (outer, x))

        # What cancels in the derivatives is of these sizes, position by position.
        self.grad_scale = torch.empty_like(self.x)
        self.second_scale = torch.empty_like(self.x)
        self.product_scale = torch.empty_like(self.stddev)
        for g, sigma in enumerate(sigmas):
            t, count = self.tangent[g :: p.groups], len(groups[g])
            u = self.grad_stddev[g].abs()[:, None] / (p.rows * p.run * count)
            size = t.square().sum(0).sqrt()
            self.grad_scale[g :: p.groups] = u * count**0.5
            self.second_scale[g :: p.groups] = 2 * u * size / sigma.detach()
            self.product_scale[g] = size.mean((0, 2)) / count**0.5

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        dtype = self.p.dtype if tensor.dim() == 4 else self.p.accumulator
        return to_numpy(tensor.to(DTYPES[dtype]))

    def check(self, name: str, array: np.ndarray, want: torch.Tensor, scale) -> None:
        """Every element within one rounding of float64, apart from what float32 computes."""
        p = self.p
        got = torch.from_numpy(array)
        got = got.view(torch.bfloat16) if got.dtype == torch.int16 else got
        dtype = p.dtype if want.dim() == 4 else p.accumulator
        allowed = ROUNDING[dtype] * want.abs() + 0.3 * COMPUTED[p.dtype] * scale
        if dtype == "float16":  # half the distance between its subnormals
            allowed = allowed + 2.0**-25
        wrong = ~((got.double() - want).abs() <= allowed)  # NaN is wrong
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} of {p}: {int(wrong.sum())} of {want.numel()} elements, first {at}: "
                f"{got[at].item()!r} instead of {want[at].item()!r}"
            )


def run(emulated, s: Solution) -> dict[str, np.ndarray]:
    """The three passes; every output's bytes, checked."""
    arrays = {}

    def call(function, names, *results):
        inputs = {name: s.pack(getattr(s, name)) for name in names}
        outputs = {name: s.pack(torch.full_like(like, torch.nan)) for name, like, _ in results}
        function(inputs, outputs, s.p.options)
        for name, want, scale in results:
            s.check(f"{function.__name__}.{name}", outputs[name], want, scale)
            arrays[f"{function.__name__}.{name}"] = outputs[name]

    call(emulated.stddev_forward, ["x"], ("stddev", s.stddev, s.stddev))
    given = ["x", "grad_stddev"]
    call(emulated.stddev_backward, given, ("grad_x", s.grad_x, s.grad_scale))
    call(
        emulated.stddev_double_backward,
        [*given, "tangent"],
        ("grad_grad_stddev", s.grad_grad_stddev, s.product_scale),
        ("grad_x", s.second, s.second_scale),
    )
    return arrays


def check_all(emulated, problem: Problem) -> None:
    """Right, and the same bit for bit whatever the order in which threads and blocks run."""
    solution, first = Solution(problem), None
    for seed in SEEDS:
        emulated.set_seed(seed)
        arrays = run(emulated, solution)
        first = first or arrays
        for name, array in arrays.items():
            assert array.tobytes() == first[name].tobytes(), f"{name} depends on the order"


def parametrize(*problems: Problem):
    return pytest.mark.parametrize("problem", problems, ids=str)


# Vectors and single elements, held members and others, and parts that remain to be merged.
EVERY_KERNEL = [
    *(
        Problem(n, 2, run=run, dtype=dtype, misalignment=misalignment)
        for dtype in DTYPES
        for n in (7, 11)
        for run, misalignment in ((16, 0), (16, 1), (13, 0))
    ),
    *(Problem(2, 1, run=9000, dtype=dtype, device=2) for dtype in ("float32", "float64")),
]


@parametrize(*EVERY_KERNEL)
def test_every_kernel(emulated, problem):
    check_all(emulated, problem)


def test_every_kernel_was_meant(emulated):
    """EVERY_KERNEL launches every instance that the library has: nothing is left untested."""
    emulated.take_launches()
    for problem in EVERY_KERNEL:
        run(emulated, Solution(problem))
    launched = {name for name, *_ in emulated.take_launches()}
    library = next(Path(emulated.__file__).parent.glob("libkernels_*.so"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"[0-9a-f]+ [A-Za-z] (void gankernels::cuda::minibatch_stddev::\w+_kernel<.*\))"
    built = {m[1] for m in re.finditer(pattern, symbols)}
    assert built == launched
    assert len(built) == 3 * (3 * 2 + 1) * 2 + 2 * 2


# Threads of a block with and without work, cells and groups of all kinds.
@parametrize(
    *[
        Problem(n, groups, rows, features, run, dtype)
        for dtype in ("float32", "bfloat16")
        for n, groups, rows, features, run in [
            *[(1, 1, 1, 1, 1), (2, 1, 1, 1, 3), (4, 1, 1, 1, 4), (5, 1, 1, 1, 5), (9, 1, 1, 1, 8)],
            *[(5, 5, 1, 1, 7), (5, 3, 1, 2, 9), (9, 2, 1, 3, 8), (70, 3, 1, 2, 12)],
            *[(4, 1, 1, 1, 511), (4, 1, 1, 1, 512), (3, 1, 1, 1, 513), (2, 1, 1, 2, 2056)],
            *[(4, 2, 5, 3, 1), (4, 2, 5, 3, 7), (5, 2, 6, 2, 8), (4, 1, 300, 2, 8)],
        ]
    ]
)
def test_sizes(emulated, problem):
    check_all(emulated, problem)


@parametrize(
    *[
        Problem(run=run, misalignment=of_inputs, output_misalignment=of_outputs, dtype=dtype)
        for dtype in ("float32", "float16")
        for run in (16, 17)
        for of_inputs, of_outputs in ((0, 1), (1, 1), (8, 0))
    ]
)
def test_alignment(emulated, problem):
    check_all(emulated, problem)


# The last part may be short.
@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (Problem(2, 1, run=8192), 1),
        (Problem(2, 1, run=8193), 2),
        (Problem(3, 1, rows=3, features=2, run=8192), 3),
        (Problem(2, 1, run=50_000, device=0), 4),
        (Problem(2, 1, run=50_000, device=2), 7),
        (Problem(5, 1, run=50_000, dtype="bfloat16"), 7),
        (Problem(2, 2, rows=1, features=2, run=40_000, device=0), 1),
        (Problem(2, 1, run=12_289, dtype="float64"), 2),
    ],
    ids=str,
)
def test_cells_divided_into_parts(emulated, problem, parts):
    emulated.take_launches()
    check_all(emulated, problem)
    launches = emulated.take_launches()
    assert {device for _, device, *_ in launches} == {problem.device}
    cells = problem.groups * problem.features
    of_cells = [blocks for name, _, blocks, _ in launches if "::cell_kernel<" in name]
    finishing = [blocks for name, _, blocks, _ in launches if "::finish_kernel<" in name]
    assert of_cells == [cells * parts] * 3 * len(SEEDS)
    assert finishing == ([cells] * 2 * len(SEEDS) if parts > 1 else [])


@pytest.mark.parametrize("n", [4, 12])
def test_large_mean(emulated, n):
    """Deviations of a few units in the last place of the mean."""
    check_all(emulated, Problem(n, 2 if n == 12 else 1, run=40, mean=1e4, std=1e-2))


@parametrize(*[Problem(5, 2, run=20, std=std, mean=0.0) for std in (1e-6, 1e-4, 1e4, 1e15)])
def test_scales(emulated, problem):
    check_all(emulated, problem)


@pytest.mark.parametrize("n", [4, 9])
def test_members_that_agree(emulated, n):
    """The deviation is the root of eps, and derivatives are what the reference says, not NaN."""
    check_all(emulated, Problem(n, 1, run=40, std=0.0))


@pytest.mark.parametrize("n", [6, 12])
def test_not_a_number_stays_in_its_cell(emulated, n):
    p = Problem(n, 2, features=3, run=8)
    s = Solution(p)
    s.x[2, 0, 1, 5] = torch.nan  # of group 0, feature 1
    result = s.pack(torch.zeros(2, 3))
    emulated.stddev_forward({"x": s.pack(s.x)}, {"stddev": result}, p.options)
    assert np.isnan(result).tolist() == [[False, True, False], [False] * 3]
    grad_x = s.pack(torch.zeros_like(s.x))
    inputs = {"x": s.pack(s.x), "grad_stddev": s.pack(s.grad_stddev)}
    emulated.stddev_backward(inputs, {"grad_x": grad_x}, p.options)
    wrong = np.zeros(grad_x.shape, dtype=bool)
    wrong[0::2, 0, 1, 5] = True
    assert np.array_equal(np.isnan(grad_x), wrong)
