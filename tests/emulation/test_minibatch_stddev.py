"""The CUDA kernels of minibatch_stddev, on the emulated device, against float64 autograd.

A block of 512 threads takes a part of a cell, the positions of one group and feature. A part has at
least 8192 positions; from there on a device's multiprocessors, 1, 4 or 132 with four blocks each,
decide into how many parts a cell is divided.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from . import harness
from .harness import DTYPES, SEEDS, Pass, Result, check_every_kernel_is_launched, parametrize


@dataclass(frozen=True)
class Problem(harness.Problem):
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


class Solution(harness.Solution):
    element_dims = 4

    def __init__(self, p: Problem):
        super().__init__(p)
        shape = (p.n, p.rows, p.features, p.run)
        self.x = self.random(*shape, dtype=p.dtype, scale=p.std, offset=p.mean)
        self.tangent = self.random(*shape, dtype=p.dtype)
        self.grad_stddev = self.random(p.groups, p.features, dtype=p.accumulator)

        x, outer = self.x.clone().requires_grad_(), self.grad_stddev.clone().requires_grad_()
        # Around a member, or float64 would not hold small deviations much better than the kernels.
        groups = [x[g :: p.groups] - self.x[g] for g in range(p.groups)]
        sigmas = [(y.var(0, correction=0) + p.eps).sqrt() for y in groups]
        stddev = torch.stack([sigma.mean((0, 2)) for sigma in sigmas])
        (grad_x,) = torch.autograd.grad(stddev, x, outer, create_graph=True)
        scalar = (grad_x * self.tangent).sum()
        grad_grad_stddev, second = torch.autograd.grad(scalar, (outer, x))
        stddev, grad_x = stddev.detach(), grad_x.detach()

        # What cancels in the derivatives is of these sizes, position by position.
        grad_scale, second_scale = torch.empty_like(self.x), torch.empty_like(self.x)
        product_scale = torch.empty_like(stddev)
        for g, sigma in enumerate(sigmas):
            t, count = self.tangent[g :: p.groups], len(groups[g])
            u = self.grad_stddev[g].abs()[:, None] / (p.rows * p.run * count)
            size = t.square().sum(0).sqrt()
            grad_scale[g :: p.groups] = u * count**0.5
            second_scale[g :: p.groups] = 2 * u * size / sigma.detach()
            product_scale[g] = size.mean((0, 2)) / count**0.5
        self.passes = (
            Pass("minibatch_stddev_forward", ("x",), {"stddev": Result(stddev, 0.3 * stddev)}),
            Pass(
                "minibatch_stddev_backward",
                ("x", "grad_stddev"),
                {"grad_x": Result(grad_x, 0.3 * grad_scale)},
            ),
            Pass(
                "minibatch_stddev_double_backward",
                ("x", "grad_stddev", "tangent"),
                {
                    "grad_grad_stddev": Result(grad_grad_stddev, 0.3 * product_scale),
                    "grad_x": Result(second, 0.3 * second_scale),
                },
            ),
        )


def check_all(emulated, problem: Problem) -> None:
    harness.check_all(emulated, Solution(problem))


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
    count = 3 * (3 * 2 + 1) * 2 + 2 * 2
    solutions = map(Solution, EVERY_KERNEL)
    check_every_kernel_is_launched(emulated, "minibatch_stddev", solutions, count)


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
    s = Solution(Problem(n, 2, features=3, run=8))
    s.x[2, 0, 1, 5] = torch.nan  # of group 0, feature 1
    inputs, options = s.inputs("x", "grad_stddev")
    result, grad_x = s.empty(s.grad_stddev), s.empty(s.x)
    emulated.minibatch_stddev_forward(inputs, {"stddev": result}, options)
    assert np.isnan(result).tolist() == [[False, True, False], [False] * 3]
    emulated.minibatch_stddev_backward(inputs, {"grad_x": grad_x}, options)
    wrong = np.zeros(grad_x.shape, dtype=bool)
    wrong[0::2, 0, 1, 5] = True
    assert np.array_equal(np.isnan(grad_x), wrong)
