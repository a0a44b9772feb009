"""The CUDA kernels of gradient_norm_penalty, on the emulated device, against float64 autograd.

A device has 1, 4 or 132 multiprocessors of 64 warps, which decides into how many parts a sample is
divided; a part has at least 4 KiB.
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
TWO_SIDED, ONE_SIDED, SQUARED = range(3)


@dataclass(frozen=True)
class Problem:
    n: int = 3
    d: int = 40
    dtype: str = "float32"
    kind: int = TWO_SIDED
    center: float = 1.0
    norm: float = 1.0  # of a sample's gradient, roughly
    misalignment: int = 0  # of inputs, in elements
    output_misalignment: int = 0
    device: int = 1

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in vars(self).items() if v != getattr(Problem, k))
        return "-".join(changed) or "default"


def penalty_of(grad: torch.Tensor, kind: int, center: float) -> torch.Tensor:
    squared = grad.square().sum(1)
    if kind == SQUARED:
        return squared.mean()
    zero = squared == 0
    norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    excess = norm - center
    return (excess.clamp(min=0) if kind == ONE_SIDED else excess).square().mean()


class Solution:
    """Random inputs, quantised to their types, and every result by its name in the kernels."""

    def __init__(self, p: Problem):
        self.p = p
        generator = torch.Generator().manual_seed(0)

        def random(*shape, dtype, scale=1.0):
            value = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.to(DTYPES[dtype]).double()

        # Norms on both sides of the centre, away from it, and one of zero.
        grad = random(p.n, p.d, dtype="float64", scale=p.norm / max(p.d, 1) ** 0.5)
        factors = torch.linspace(0.3, 3.1, p.n, dtype=torch.float64)[:, None]
        if p.n > 2:
            factors[1] = 0
        self.grad = (grad * factors).to(DTYPES[p.dtype]).double()
        self.tangent = random(p.n, p.d, dtype=p.dtype)
        self.grad_penalty = random(1, dtype=p.accumulator)

        grad = self.grad.clone().requires_grad_()
        outer = self.grad_penalty.clone().requires_grad_()
        self.penalty = penalty_of(grad, p.kind, p.center)[None]
        (self.grad_grad,) = torch.autograd.grad(self.penalty, grad, outer, create_graph=True)
        scalar = (self.grad_grad * self.tangent).sum()
        self.grad_grad_penalty, second = torch.autograd.grad(
            scalar, (outer, grad), allow_unused=True
        )
        self.second = torch.zeros_like(grad) if second is None else second
        # What cancels in the derivatives is of these sizes, sample by sample.
        squared = self.grad.square().sum(1)
        norm = torch.where(squared == 0, torch.inf, squared.sqrt())
        factor = 2 / max(p.n, 1) * self.grad_penalty.abs() * (1 + p.center / norm)
        self.grad_scale = (factor * squared.sqrt())[:, None]
        self.second_scale = 2 * (factor * self.tangent.norm(dim=1))[:, None]
        self.product_scale = (
            2
            / max(p.n, 1)
            * ((1 + p.center / norm) * (self.grad * self.tangent).abs().sum(1)).sum(0, keepdim=True)
        )
        self.squared_norms = squared

    def options(self) -> dict:
        names = ("n", "d", "dtype", "kind", "center", "misalignment", "device")
        options = {name: getattr(self.p, name) for name in names}
        return options | {"output_misalignment": self.p.output_misalignment}

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        dtype = self.p.dtype if tensor.dim() == 2 else self.p.accumulator
        return to_numpy(tensor.to(DTYPES[dtype]))

    def check(self, name: str, array: np.ndarray, want: torch.Tensor, scale) -> None:
        """Every element within one rounding of float64, apart from what float32 computes."""
        p = self.p
        got = torch.from_numpy(array)
        got = got.view(torch.bfloat16) if got.dtype == torch.int16 else got
        dtype = p.dtype if want.dim() == 2 else p.accumulator
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
    options, arrays = s.options(), {}

    def empty(like):
        return s.pack(torch.full_like(like, torch.nan))

    def call(function, inputs, outputs):
        function(inputs, outputs, options)
        arrays.update({f"{function.__name__}.{name}": a for name, a in outputs.items()})
        return outputs

    given = {"grad": s.pack(s.grad)}
    outputs = {"penalty": empty(s.penalty), "squared_norms": empty(s.squared_norms)}
    out = call(emulated.penalty_forward, given, outputs)
    s.check("squared_norms", out["squared_norms"], s.squared_norms, s.squared_norms)
    s.check("penalty", out["penalty"], s.penalty, s.penalty + s.p.center**2)

    given["squared_norms"] = out["squared_norms"].copy()
    given["grad_penalty"] = s.pack(s.grad_penalty)
    out = call(emulated.penalty_backward, given, {"grad_grad": empty(s.grad)})
    s.check("grad_grad", out["grad_grad"], s.grad_grad, s.grad_scale)

    given["tangent"] = s.pack(s.tangent)
    outputs = {"grad_grad_penalty": empty(s.penalty), "grad_grad": empty(s.grad)}
    out = call(emulated.penalty_double_backward, given, outputs)
    product = out["grad_grad_penalty"]
    s.check("grad_grad_penalty", product, s.grad_grad_penalty, s.product_scale)
    s.check("second grad_grad", out["grad_grad"], s.second, s.second_scale)
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
    emulated.take_launches()
    for problem in EVERY_KERNEL:
        run(emulated, Solution(problem))
    launched = {name for name, *_ in emulated.take_launches()}
    library = next(Path(emulated.__file__).parent.glob("libkernels_*.so"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"[0-9a-f]+ [A-Za-z] (void gankernels::cuda::gradient_norm_penalty::\w+_kernel<.*\))"
    built = {m[1] for m in re.finditer(pattern, symbols)}
    assert built == launched
    assert len(built) == 30


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
    arrays = run(emulated, s)
    for name in ("penalty_backward", "penalty_double_backward"):
        assert (arrays[f"{name}.grad_grad"][1] == 0).all()


def test_not_a_number_stays_in_its_sample(emulated):
    s = Solution(Problem(3, 70))
    grad = s.grad.clone()
    grad[2, 69] = torch.nan
    given = {"grad": s.pack(grad)}
    outputs = {"penalty": s.pack(s.penalty), "squared_norms": s.pack(s.squared_norms)}
    emulated.penalty_forward(given, outputs, s.options())
    assert np.isnan(outputs["penalty"]).all()
    assert np.isnan(outputs["squared_norms"]).tolist() == [False, False, True]
    given |= {"squared_norms": outputs["squared_norms"], "grad_penalty": s.pack(s.grad_penalty)}
    result = s.pack(torch.zeros_like(s.grad))
    emulated.penalty_backward(given, {"grad_grad": result}, s.options())
    assert np.isnan(result).all(1).tolist() == [False, False, True]
    assert np.isnan(result).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", [TWO_SIDED, ONE_SIDED, SQUARED])
@pytest.mark.parametrize("n", [0, 3])
def test_empty(emulated, n, kind):
    """The mean over no samples is 0 / 0; samples of nothing have a norm of zero."""
    s = Solution(Problem(n, 0 if n else 5, kind=kind, center=2.0))
    options = s.options()
    given = {"grad": s.pack(s.grad)}
    penalty, norms = s.pack(s.penalty), s.pack(torch.full((n,), torch.nan))
    emulated.penalty_forward(given, {"penalty": penalty, "squared_norms": norms}, options)
    want = np.nan if n == 0 else 4.0 if kind == TWO_SIDED else 0.0
    np.testing.assert_array_equal(penalty, [want])
    assert (norms == 0).all()
    given |= {"squared_norms": norms, "grad_penalty": s.pack(s.grad_penalty)}
    emulated.penalty_backward(given, {"grad_grad": s.pack(s.grad)}, options)
    given["tangent"] = s.pack(s.tangent)
    outputs = {"grad_grad_penalty": penalty, "grad_grad": s.pack(s.grad)}
    emulated.penalty_double_backward(given, outputs, options)
    np.testing.assert_array_equal(penalty, [np.nan if n == 0 else 0.0])
