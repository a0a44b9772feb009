"""The CUDA kernels of minibatch_discrimination, emulated, against float64 autograd."""

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
SEEDS = (0,) if "GANKERNELS_EMULATION" in os.environ else (0, 1)
# The sizes that C is padded to, and above them the kernel for any C.
SMALL_C = {"float32": (2, 4, 5, 8, 12, 16, 24, 32), "float64": (4, 8, 16)}


@dataclass(frozen=True)
class Problem:
    n: int = 9
    b: int = 2
    c: int = 5
    dtype: str = "float32"
    layout: str = "contiguous"
    ties: bool = False
    misalignment: int = 0  # of every array, in elements
    device: int = 1

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Problem, k))
        return "-".join(changed) or "default"


def discrimination(m: torch.Tensor) -> torch.Tensor:
    distances = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(-1)
    itself = torch.eye(m.shape[0], dtype=torch.bool).unsqueeze(-1)
    return torch.exp(-distances).masked_fill(itself, 0).sum(0)


class Solution:
    """Random inputs, quantised to the type, and every result by its name in the kernels."""

    def __init__(self, p: Problem):
        self.p = p
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.to(DTYPES[p.dtype]).double()

        self.m = random(p.n, p.b, p.c, scale=2 / max(p.c, 1))
        if p.ties:  # samples that are the same, and some that differ in few dimensions
            self.m[p.n // 2 :] = self.m[: p.n - p.n // 2].clone()
            self.m[::3, :, : p.c // 2] = self.m[0, :, : p.c // 2].clone()
        self.grad_o = random(p.n, p.b)
        self.grad_grad_m = random(p.n, p.b, p.c)
        if p.layout == "expanded":
            self.grad_o[:] = self.grad_o[:1, :1].clone()
            self.grad_grad_m[:] = self.grad_grad_m[:, :, :1].clone()

        m, grad_o = self.m.clone().requires_grad_(), self.grad_o.clone().requires_grad_()
        self.o = discrimination(m)
        (self.grad_m,) = torch.autograd.grad(self.o, m, grad_o, create_graph=True)
        self.grad_grad_o, self.second = torch.autograd.grad(
            self.grad_m, (grad_o, m), self.grad_grad_m
        )

        # What cancels in the sums over pairs is of these sizes.
        difference = self.m.unsqueeze(0) - self.m.unsqueeze(1)
        e = torch.exp(-difference.abs().sum(-1))
        e = e * (1 - torch.eye(p.n, dtype=torch.float64)).unsqueeze(-1)
        g = self.grad_o.abs()
        weight = e * (g.unsqueeze(0) + g.unsqueeze(1))
        v = self.grad_grad_m
        s = (difference.sign().abs() * (v.unsqueeze(0) - v.unsqueeze(1)).abs()).sum(-1)
        self.scales = {
            "o": e.sum(0),
            "grad_m": weight.sum(0).unsqueeze(-1),
            "grad_grad_o": (e * s).sum(0),
            "second": (weight * s).sum(0).unsqueeze(-1),
        }

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        return to_numpy(tensor.to(DTYPES[self.p.dtype]))

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

    def inputs(self, *names: str) -> tuple[dict, dict]:
        """The arrays of these names, and the options of a call that gets them."""
        options = {k: getattr(self.p, k) for k in ("n", "b", "c", "dtype", "device")}
        options["misalignment"] = self.p.misalignment
        arrays = {}
        for name in names:
            arrays[name], options[f"{name}_strides"] = self.lay_out(getattr(self, name))
        return arrays, options

    def empty(self, like: torch.Tensor) -> np.ndarray:
        return self.pack(torch.full_like(like, torch.nan))

    def check(self, name: str, array: np.ndarray) -> None:
        """Every element within one rounding of float64, apart from what float32 computes."""
        p, want = self.p, getattr(self, name)
        got = torch.from_numpy(array)
        got = got.view(torch.bfloat16) if got.dtype == torch.int16 else got
        allowed = ROUNDING[p.dtype] * want.abs() + COMPUTED[p.dtype] * self.scales[name]
        if p.dtype == "float16":  # half the distance between its subnormals
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
    o, grad_m, grad_grad_o, second = map(s.empty, (s.o, s.grad_m, s.grad_grad_o, s.second))
    inputs, options = s.inputs("m")
    emulated.discrimination_forward(inputs, {"o": o}, options)
    s.check("o", o)
    inputs, options = s.inputs("m", "grad_o")
    emulated.discrimination_backward(inputs, {"grad_m": grad_m}, options)
    s.check("grad_m", grad_m)
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    outputs = {"grad_grad_o": grad_grad_o, "grad_m": second}
    emulated.discrimination_double_backward(inputs, outputs, options)
    s.check("grad_grad_o", grad_grad_o)
    s.check("second", second)
    return {"o": o, "grad_m": grad_m, "grad_grad_o": grad_grad_o, "second": second}


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
    emulated.take_launches()
    for problem in EVERY_KERNEL:
        run(emulated, Solution(problem))
    launched = {name for name, *_ in emulated.take_launches()}
    library = next(Path(emulated.__file__).parent.glob("libkernels_*.so"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    name = r"gankernels::cuda::minibatch_discrimination::\w+_kernel<"
    built = {m[1] for m in re.finditer(rf"[0-9a-f]+ [A-Za-z] (void {name}.*\))\n", symbols)}
    assert built == launched
    assert len(built) == 39


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
    o, grad_m, grad_grad_o, second = map(s.empty, (s.o, s.grad_m, s.grad_grad_o, s.second))
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    m, grad_o = (
        {k: v for k, v in inputs.items() if k in names} for names in ("m", ("m", "grad_o"))
    )
    emulated.discrimination_forward(m, {"o": o}, options)
    emulated.discrimination_backward(grad_o, {"grad_m": grad_m}, options)
    outputs = {"grad_grad_o": grad_grad_o, "grad_m": second}
    emulated.discrimination_double_backward(inputs, outputs, options)
    assert (o == 69).all()
    for zero in (grad_m, grad_grad_o, second):
        assert (zero == 0).all()


@pytest.mark.parametrize("c", [4, 33])
def test_double_backward_without_grad_m(emulated, c):
    s = Solution(Problem(70, 2, c))
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    grad_grad_o = s.empty(s.grad_grad_o)
    emulated.discrimination_double_backward(inputs, {"grad_grad_o": grad_grad_o}, options)
    s.check("grad_grad_o", grad_grad_o)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 87.33), ("float64", 700.0)])
@pytest.mark.parametrize("c", [1, 64])
def test_distances_up_to_where_similarities_vanish(emulated, c, dtype, limit):
    """In float32 down to the smallest normal number; below it they are zero."""
    s = Solution(Problem(3, 1, c, dtype))
    for distance in (1e-6, 1.0, limit * 0.6, limit, limit + 0.05, 1e4, np.inf):
        s.m[:] = torch.tensor([0.0, distance, np.inf], dtype=torch.float64)[:, None, None]
        s.m[:, :, 1:] = 0
        m = s.m.to(DTYPES[dtype]).double()
        o = s.empty(s.o)
        emulated.discrimination_forward(*((i := s.inputs("m"))[0], {"o": o}, i[1]))
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
    o = s.empty(s.o)
    inputs, options = s.inputs("m")
    emulated.discrimination_forward(inputs, {"o": o}, options)
    assert (o == max(problem.n - 1, 0)).all()
    inputs, options = s.inputs("m", "grad_o", "grad_grad_m")
    second, grad_grad_o = s.empty(s.second), s.empty(s.grad_grad_o)
    outputs = {"grad_grad_o": grad_grad_o, "grad_m": second}
    emulated.discrimination_double_backward(inputs, outputs, options)
    assert (second == 0).all()
    assert (grad_grad_o == 0).all()


@pytest.mark.parametrize("c", [3, 40])
def test_not_a_number_reaches_every_sample(emulated, c):
    s = Solution(Problem(40, 2, c))
    s.m[7, 1, 2] = torch.nan
    o = s.empty(s.o)
    inputs, options = s.inputs("m")
    emulated.discrimination_forward(inputs, {"o": o}, options)
    assert np.isnan(o[:, 1]).all()
    assert np.isfinite(o[:, 0]).all()


def test_too_many_samples(emulated):
    s = Solution(Problem(2, 1, 3))
    inputs, options = s.inputs("m")
    with pytest.raises(RuntimeError, match=r"minibatch_discrimination: more than 2\^30 samples"):
        emulated.discrimination_forward(inputs, {"o": s.empty(s.o)}, options | {"n": 2**31})
    with pytest.raises(RuntimeError, match=r"minibatch_discrimination: more than 2\^31 blocks"):
        emulated.discrimination_forward(inputs, {"o": s.empty(s.o)}, options | {"b": 2**32})
