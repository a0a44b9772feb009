"""The CUDA kernels of gradient_norm_penalty, on the emulated device, against float64 autograd.

A device has 1, 4 or 132 multiprocessors of 64 warps, which decides into how many parts a sample is
divided; a part has at least 4 KiB.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from . import harness
from .harness import DTYPES, SEEDS, Pass, Result, check_every_kernel_is_launched, parametrize

TWO_SIDED, ONE_SIDED, SQUARED = range(3)


@dataclass(frozen=True)
class Problem(harness.Problem):
    n: int = 3
    d: int = 40
    dtype: str = "float32"
    kind: int = TWO_SIDED
    center: float = 1.0
    norm: float = 1.0  # of a sample's gradient, roughly
    misalignment: int = 0  # of inputs, in elements
    output_misalignment: int = 0
    device: int = 1


def penalty_of(grad: torch.Tensor, kind: int, center: float) -> torch.Tensor:
    squared = grad.square().sum(1)
    if kind == SQUARED:
        return squared.mean()
    zero = squared == 0
    norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    excess = norm - center
    return (excess.clamp(min=0) if kind == ONE_SIDED else excess).square().mean()


class Solution(harness.Solution):
    element_dims = 2

    def __init__(self, p: Problem):
        super().__init__(p)
        # Norms on both sides of the center, away from it, and one of zero.
        grad = self.random(p.n, p.d, dtype="float64", scale=p.norm / max(p.d, 1) ** 0.5)
        factors = torch.linspace(0.3, 3.1, p.n, dtype=torch.float64)[:, None]
        if p.n > 2:
            factors[1] = 0
        self.grad = (grad * factors).to(DTYPES[p.dtype]).double()
        self.tangent = self.random(p.n, p.d, dtype=p.dtype)
        self.grad_penalty = self.random(1, dtype=p.accumulator)

        grad = self.grad.clone().requires_grad_()
        outer = self.grad_penalty.clone().requires_grad_()
        penalty = penalty_of(grad, p.kind, p.center)[None]
        (grad_grad,) = torch.autograd.grad(penalty, grad, outer, create_graph=True)
        scalar = (grad_grad * self.tangent).sum()
        grad_grad_penalty, second = torch.autograd.grad(scalar, (outer, grad), allow_unused=True)
        second = torch.zeros_like(grad) if second is None else second
        penalty, grad_grad = penalty.detach(), grad_grad.detach()
        # What cancels in the derivatives is of these sizes, sample by sample.
        squared = self.grad.square().sum(1)
        norm = torch.where(squared == 0, torch.inf, squared.sqrt())
        phi = 2 / max(p.n, 1) * (1 + p.center / norm)
        factor = phi * self.grad_penalty.abs()
        grad_scale = (factor * squared.sqrt())[:, None]
        second_scale = 2 * (factor * self.tangent.norm(dim=1))[:, None]
        product_scale = (phi * (self.grad * self.tangent).abs().sum(1)).sum(0, keepdim=True)
        given = ("grad", "squared_norms", "grad_penalty")
        self.passes = (
            Pass(
                "gradient_norm_penalty_forward",
                ("grad",),
                {
                    "squared_norms": Result(squared, 0.3 * squared),
                    "penalty": Result(penalty, 0.3 * (penalty + p.center**2)),
                },
            ),
            Pass(
                "gradient_norm_penalty_backward",
                given,
                {"grad_grad": Result(grad_grad, 0.3 * grad_scale)},
            ),
            Pass(
                "gradient_norm_penalty_double_backward",
                (*given, "tangent"),
                {
                    "grad_grad_penalty": Result(grad_grad_penalty, 0.3 * product_scale),
                    "grad_grad": Result(second, 0.3 * second_scale),
                },
            ),
        )


def check_all(emulated, problem: Problem) -> None:
    harness.check_all(emulated, Solution(problem))


# Aligned, aligned alike, and tensors that no access wider than an element serves.
EVERY_KERNEL = [
    Problem(dtype=dtype, d=d, misalignment=misalignment, output_misalignment=of_output)
    for dtype in DTYPES
    for d, misalignment, of_output in [(40, 0, 0), (43, 0, 0), (43, 1, 1), (43, 0, 1), (40, 1, 0)]
]


@parametrize(*EVERY_KERNEL)
def test_every_kernel(emulated, problem):
    check_all(emulated, problem)


def test_every_kernel_was_meant(emulated):
    """EVERY_KERNEL launches every instance that the library has: nothing is left untested."""
    solutions = map(Solution, EVERY_KERNEL)
    check_every_kernel_is_launched(emulated, "gradient_norm_penalty", solutions, 30)


@parametrize(
    *[
        Problem(n, d, dtype, kind=n % 3, output_misalignment=d % 2, misalignment=d % 2)
        for dtype in ("float32", "bfloat16")
        for n, d in [
            *[(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (9, 9), (8, 31), (17, 33), (2, 127)],
            *[(2, 128), (2, 129), (3, 255), (1, 511), (1, 512), (1, 513), (40, 1)],
        ]
    ],
    Problem(1100, 2),  # more than finish_kernel has threads
)
def test_sizes(emulated, problem):
    check_all(emulated, problem)


# Up to 4 KiB a sample is one part; from there on until the device's warps are busy.
@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (Problem(3, 1024), 1),
        (Problem(3, 1025), 2),
        (Problem(2, 2049, misalignment=3, output_misalignment=3), 3),
        (Problem(1, 70_000, device=0), 35),
        (Problem(1, 70_000, device=2), 69),
        (Problem(33, 2050, device=0), 1),
        (Problem(32, 2050, device=0), 2),
        (Problem(3, 5003, dtype="float64", kind=SQUARED), 10),
        (Problem(3, 5003, dtype="bfloat16", misalignment=1), 3),
        (Problem(3, 5003, dtype="float16", kind=ONE_SIDED, output_misalignment=2), 3),
    ],
    ids=str,
)
def test_samples_divided_into_parts(emulated, problem, parts):
    emulated.take_launches()
    check_all(emulated, problem)
    launches = emulated.take_launches()
    assert {device for _, device, *_ in launches} == {problem.device}
    assert len(launches) == 5 * len(SEEDS)
    dots = [blocks for name, _, blocks, _ in launches if "::dot_kernel<" in name]
    assert set(dots) == {-(-problem.n * parts // 8)}


@parametrize(
    *[
        Problem(5, 83, dtype, kind, center, norm)
        for dtype in DTYPES
        for kind in (TWO_SIDED, ONE_SIDED, SQUARED)
        for center, norm in ((1.0, 1.0), (0.0, 1.0), (7.5, 5.0))
    ]
)
def test_types_kinds_and_centers(emulated, problem):
    check_all(emulated, problem)


def test_a_tiny_norm_does_not_overflow(emulated):
    """phi'' is 1e42 here, beyond float32; what it is multiplied by brings it back."""
    check_all(emulated, Problem(4, 50, norm=1e-14))


def test_a_norm_of_zero_has_no_derivative(emulated):
    s = Solution(Problem(3, 70))
    assert (s.grad[1] == 0).all()
    arrays = harness.run(emulated, s)
    for name in ("backward", "double_backward"):
        assert (arrays[f"gradient_norm_penalty_{name}.grad_grad"][1] == 0).all()


def test_not_a_number_stays_in_its_sample(emulated):
    s = Solution(Problem(3, 70))
    s.grad[2, 69] = torch.nan
    inputs, options = s.inputs("grad", "grad_penalty")
    norms, penalty, grad_grad = (s.empty(torch.empty(size)) for size in ((3,), (1,), (3, 70)))
    outputs = {"penalty": penalty, "squared_norms": norms}
    emulated.gradient_norm_penalty_forward(inputs, outputs, options)
    assert np.isnan(penalty).all()
    assert np.isnan(norms).tolist() == [False, False, True]
    inputs["squared_norms"] = norms
    emulated.gradient_norm_penalty_backward(inputs, {"grad_grad": grad_grad}, options)
    assert np.isnan(grad_grad).all(1).tolist() == [False, False, True]
    assert np.isnan(grad_grad).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", [TWO_SIDED, ONE_SIDED, SQUARED])
@pytest.mark.parametrize("n", [0, 3])
def test_empty(emulated, n, kind):
    """The mean over no samples is 0 / 0; samples of nothing have a norm of zero."""
    s = Solution(Problem(n, 0 if n else 5, kind=kind, center=2.0))
    inputs, options = s.inputs("grad", "grad_penalty", "tangent")
    norms, penalty = (s.empty(torch.empty(size)) for size in ((n,), (1,)))
    outputs = {"penalty": penalty, "squared_norms": norms}
    emulated.gradient_norm_penalty_forward(inputs, outputs, options)
    want = np.nan if n == 0 else 4.0 if kind == TWO_SIDED else 0.0
    np.testing.assert_array_equal(penalty, [want])
    assert (norms == 0).all()
    inputs["squared_norms"] = norms
    emulated.gradient_norm_penalty_backward(inputs, {"grad_grad": s.empty(s.grad)}, options)
    outputs = {"grad_grad_penalty": penalty, "grad_grad": s.empty(s.grad)}
    emulated.gradient_norm_penalty_double_backward(inputs, outputs, options)
    np.testing.assert_array_equal(penalty, [np.nan if n == 0 else 0.0])
