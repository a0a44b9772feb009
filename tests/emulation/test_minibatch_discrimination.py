"""The CUDA kernels of minibatch_discrimination, emulated, against float64 autograd."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from . import harness
from .harness import DTYPES, Pass, Result, call, check_every_kernel_is_launched, parametrize

SEEDS = harness.SEEDS[:2]
# The sizes that C is padded to, and above them the kernel for any C.
SMALL_C = {"float32": (2, 4, 5, 8, 12, 16, 24, 32), "float64": (4, 8, 16)}


@dataclass(frozen=True)
class Problem(harness.Problem):
    n: int = 9
    b: int = 2
    c: int = 5
    dtype: str = "float32"
    layout: str = "contiguous"
    ties: bool = False
    misalignment: int = 0  # of every array, in elements
    device: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"output_misalignment": self.misalignment}


def discrimination(m: torch.Tensor) -> torch.Tensor:
    distances = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(-1)
    itself = torch.eye(m.shape[0], dtype=torch.bool).unsqueeze(-1)
    return torch.exp(-distances).masked_fill(itself, 0).sum(0)


class Solution(harness.Solution):
    def __init__(self, p: Problem):
        super().__init__(p)
        self.m = self.random(p.n, p.b, p.c, dtype=p.dtype, scale=2 / max(p.c, 1))
        if p.ties:  # samples that are the same, and some that differ in few dimensions
            self.m[p.n // 2 :] = self.m[: p.n - p.n // 2].clone()
            self.m[::3, :, : p.c // 2] = self.m[0, :, : p.c // 2].clone()
        self.grad_o = self.random(p.n, p.b, dtype=p.dtype)
        self.grad_grad_m = self.random(p.n, p.b, p.c, dtype=p.dtype)
        if p.layout == "expanded":
            self.grad_o[:] = self.grad_o[:1, :1].clone()
            self.grad_grad_m[:] = self.grad_grad_m[:, :, :1].clone()

        m, grad_o = self.m.clone().requires_grad_(), self.grad_o.clone().requires_grad_()
        o = discrimination(m)
        (grad_m,) = torch.autograd.grad(o, m, grad_o, create_graph=True)
        grad_grad_o, second = torch.autograd.grad(grad_m, (grad_o, m), self.grad_grad_m)
        o, grad_m = o.detach(), grad_m.detach()

        # What cancels in the sums over pairs is of these sizes.
        difference = self.m.unsqueeze(0) - self.m.unsqueeze(1)
        e = torch.exp(-difference.abs().sum(-1))
        e = e * (1 - torch.eye(p.n, dtype=torch.float64)).unsqueeze(-1)
        g = self.grad_o.abs()
        weight = e * (g.unsqueeze(0) + g.unsqueeze(1))
        v = self.grad_grad_m
        s = (difference.sign().abs() * (v.unsqueeze(0) - v.unsqueeze(1)).abs()).sum(-1)
        self.passes = (
            Pass("minibatch_discrimination_forward", ("m",), {"o": Result(o, e.sum(0))}),
            Pass(
                "minibatch_discrimination_backward",
                ("m", "grad_o"),
                {"grad_m": Result(grad_m, weight.sum(0).unsqueeze(-1))},
            ),
            Pass(
                "minibatch_discrimination_double_backward",
                ("m", "grad_o", "grad_grad_m"),
                {
                    "grad_grad_o": Result(grad_grad_o, (e * s).sum(0)),
                    "grad_m": Result(second, (weight * s).sum(0).unsqueeze(-1)),
                },
            ),
        )

    def dtype_of(self, tensor: torch.Tensor) -> str:
        return self.p.dtype

    def lay_out(self, tensor: torch.Tensor) -> tuple[np.ndarray, list[int]]:
        """The memory that the tensor lies in, in the problem's layout, and its strides."""
        if self.p.layout == "transposed":
            memory = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
            return self.pack(memory), list(memory.stride()[::-1])
        if self.p.layout == "sliced":
            memory = torch.full((*tensor.shape, 3), torch.nan, dtype=torch.float64)
            memory[..., 0] = tensor
            return self.pack(memory), list(memory.stride()[:-1])
        if self.p.layout == "expanded" and tensor is not self.m:
            memory = tensor[:, :, :1] if tensor.dim() == 3 else tensor[:1, :1]
            memory = memory.clone(memory_format=torch.contiguous_format)
            return self.pack(memory), list(memory.expand_as(tensor).stride())
        return self.pack(tensor), list(tensor.contiguous().stride())

    def inputs(self, *names: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, options = {}, self.p.options
        for name in names:
            arrays[name], options[f"{name}_strides"] = self.lay_out(getattr(self, name))
        return arrays, options


def check_all(emulated, problem: Problem) -> None:
    harness.check_all(emulated, Solution(problem), SEEDS)


# Every size that C is padded to, filled and not, and what is beyond the last.
EVERY_KERNEL = [
    Problem(11, 2, c, dtype)
    for dtype, sizes in SMALL_C.items()
    for c in sorted({c - less for c in sizes for less in (0, 1)} | {sizes[-1] + 1})
]


@parametrize(*EVERY_KERNEL)
def test_every_kernel(emulated, problem):
    check_all(emulated, problem)


def test_every_kernel_was_meant(emulated):
    """EVERY_KERNEL launches every instance that the library has: nothing is left untested."""
    solutions = map(Solution, EVERY_KERNEL)
    check_every_kernel_is_launched(emulated, "minibatch_discrimination", solutions, 39)


# Rows around those of a warp (64 forward, 32 else), of a block (up to 256), of a tile (128).
@parametrize(
    *[
        Problem(n, b, 3, device=device)
        for n, b, device in [
            *[(1, 1, 1), (2, 3, 0), (31, 1, 1), (32, 1, 1), (33, 2, 1), (63, 2, 2), (64, 1, 0)],
            *[(65, 4, 0), (127, 1, 1), (128, 4, 0), (129, 4, 0), (129, 1, 2), (257, 4, 0)],
        ]
    ]
)
def test_sizes_of_small_c(emulated, problem):
    check_all(emulated, problem)


# Rows around those of a tile (64, float64: 32), dimensions around those of a chunk (16).
@parametrize(
    *[
        Problem(n, b, c, dtype)
        for n, b, c, dtype in [
            *[(1, 1, 33, "float32"), (2, 2, 47, "float32"), (63, 1, 48, "float32")],
            *[(64, 2, 49, "float32"), (65, 1, 40, "float32"), (129, 2, 35, "float32")],
            *[(5, 1, 512, "float32"), (31, 1, 17, "float64"), (32, 1, 32, "float64")],
            *[(33, 2, 48, "float64"), (65, 2, 17, "float64"), (65, 2, 34, "bfloat16")],
            *[(130, 1, 33, "float16"), (7, 1, 100, "bfloat16")],
        ]
    ]
)
def test_sizes_of_large_c(emulated, problem):
    check_all(emulated, problem)


@pytest.mark.parametrize(
    ("problem", "threads", "blocks"),
    [
        # Few blocks: the warps of a block divide the rows j among themselves.
        (Problem(200, 1, 4, device=2), 128, [4, 7, 7]),
        # Enough of them: the warps own rows of their own.
        (Problem(300, 4, 4, device=0), 128, [2 * 4, 3 * 4, 3 * 4]),
        (Problem(130, 2, 4, device=0), 128, [2 * 2, 2 * 2, 2 * 2]),
        # But no warp stays without rows.
        (Problem(60, 8, 4, device=0), 128, [8, 8, 8]),
        (Problem(70, 2, 40), 256, [4, 4, 4]),
    ],
    ids=str,
)
def test_blocks(emulated, problem, threads, blocks):
    emulated.take_launches()
    check_all(emulated, problem)
    launches = emulated.take_launches()
    assert [b for _, _, b, _ in launches] == blocks * len(SEEDS)
    assert {(d, t) for _, d, _, t in launches} == {(problem.device, threads)}


@parametrize(
    *[
        Problem(37, 2, c, dtype, layout, ties, misalignment=misalignment)
        for dtype in DTYPES
        for c in (5, 36)
        for layout, ties, misalignment in (
            *[("contiguous", True, 1), ("transposed", False, 0), ("sliced", False, 0)],
            *[("expanded", False, 3)],
        )
    ]
)
def test_types_layouts_and_ties(emulated, problem):
    check_all(emulated, problem)


@pytest.mark.parametrize("c", [3, 40])
def test_samples_all_the_same(emulated, c):
    """Mode collapse: every similarity is one, and nothing pulls the samples anywhere."""
    s = Solution(Problem(70, 2, c))
    s.m[:] = s.m[:1].clone()
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    (o, grad_grad_o), (grad_m, second) = ((s.empty(x), s.empty(x)) for x in (s.grad_o, s.m))
    emulated.minibatch_discrimination_forward(inputs, {"o": o}, options)
    emulated.minibatch_discrimination_backward(inputs, {"grad_m": grad_m}, options)
    outputs = {"grad_grad_o": grad_grad_o, "grad_m": second}
    emulated.minibatch_discrimination_double_backward(inputs, outputs, options)
    assert (o == 69).all()
    for zero in (grad_m, grad_grad_o, second):
        assert (zero == 0).all()


@pytest.mark.parametrize("c", [4, 33])
def test_double_backward_without_grad_m(emulated, c):
    call(emulated, Solution(Problem(70, 2, c)), 2, ["grad_grad_o"])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 87.33), ("float64", 700.0)])
@pytest.mark.parametrize("c", [1, 64])
def test_distances_up_to_where_similarities_vanish(emulated, c, dtype, limit):
    """In float32 down to the smallest normal number; below it they are zero."""
    s = Solution(Problem(3, 1, c, dtype))
    for distance in (1e-6, 1.0, limit * 0.6, limit, limit + 0.05, 1e4, np.inf):
        s.m[:] = torch.tensor([0.0, distance, np.inf], dtype=torch.float64)[:, None, None]
        s.m[:, :, 1:] = 0
        m = s.m.to(DTYPES[dtype]).double()
        o = s.empty(s.grad_o)
        inputs, options = s.inputs("m")
        emulated.minibatch_discrimination_forward(inputs, {"o": o}, options)
        want = np.exp(-float(m[1, 0, 0]))
        if dtype == "float32" and want < 2.0**-126:
            want = 0.0
        tolerance = 1e-13 if dtype == "float64" else 2e-5 if distance > 10 else 1e-6
        if np.isfinite(distance):
            np.testing.assert_allclose(o[:2, 0], [want, want], rtol=tolerance)
            assert o[2, 0] == 0
        else:
            assert o[0, 0] == 0  # and inf - inf is not a number
            assert np.isnan(o[1:, 0]).all()


@parametrize(Problem(0, 2, 3), Problem(3, 0, 2), Problem(4, 2, 0), Problem(1, 3, 2))
def test_empty(emulated, problem):
    """A sample alone is like no other; without dimensions, all are the same."""
    s = Solution(problem)
    o = s.empty(s.grad_o)
    inputs, options = s.inputs("m")
    emulated.minibatch_discrimination_forward(inputs, {"o": o}, options)
    assert (o == max(problem.n - 1, 0)).all()
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    second, grad_grad_o = s.empty(s.m), s.empty(s.grad_o)
    outputs = {"grad_grad_o": grad_grad_o, "grad_m": second}
    emulated.minibatch_discrimination_double_backward(inputs, outputs, options)
    assert (second == 0).all()
    assert (grad_grad_o == 0).all()


@pytest.mark.parametrize("c", [3, 40])
def test_not_a_number_reaches_every_sample(emulated, c):
    s = Solution(Problem(40, 2, c))
    s.m[7, 1, 2] = torch.nan
    o = s.empty(s.grad_o)
    inputs, options = s.inputs("m")
    emulated.minibatch_discrimination_forward(inputs, {"o": o}, options)
    assert np.isnan(o[:, 1]).all()
    assert np.isfinite(o[:, 0]).all()


def test_too_many_samples(emulated):
    s = Solution(Problem(2, 1, 3))
    inputs, options = s.inputs("m")
    with pytest.raises(RuntimeError, match=r"minibatch_discrimination: more than 2\^30 samples"):
        emulated.minibatch_discrimination_forward(
            inputs, {"o": s.empty(s.grad_o)}, options | {"n": 2**31}
        )
    with pytest.raises(RuntimeError, match=r"minibatch_discrimination: more than 2\^31 blocks"):
        emulated.minibatch_discrimination_forward(
            inputs, {"o": s.empty(s.grad_o)}, options | {"b": 2**32}
        )
