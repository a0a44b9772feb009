"""Problems for the batch_norm_leaky_relu kernels, and their solutions in float64."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Of one rounding to the type, and of everything computed in the accumulation type before it.
ROUNDING = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8, "float16": 2.0**-11}
COMPUTED = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 1e-5, "float16": 1e-5}


@dataclass(frozen=True)
class Problem:
    n: int = 4
    c: int = 3
    s: int = 16
    channels_last: bool = False
    dtype: str = "float32"
    parameter_dtype: str = "float32"
    activation_first: bool = False
    training: bool = True
    affine: bool = True
    negative_slope: float = 0.2
    eps: float = 0.1  # large, so that few elements per channel are no ill-conditioned problem
    mean: float = 0.5
    std: float = 1.0
    misalignment: int = 0  # of every array, in elements
    device: int = 1

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def options(self) -> dict:
        names = ["n", "c", "s", "channels_last", "dtype", "parameter_dtype", "activation_first"]
        names += ["training", "eps", "negative_slope", "misalignment", "device"]
        return {**{k: getattr(self, k) for k in names}, "count": float(self.n * self.s)}

    def __str__(self) -> str:
        parts = [f"{self.n}x{self.c}x{self.s}", self.dtype]
        default = Problem()
        numbers = ("negative_slope", "eps", "mean", "std", "misalignment", "device")
        for name in ("parameter_dtype", *numbers):
            if getattr(self, name) != getattr(default, name):
                parts.append(f"{name}={getattr(self, name)}")
        for name in ("channels_last", "activation_first"):
            if getattr(self, name):
                parts.append(name)
        for name in ("training", "affine"):
            if not getattr(self, name):
                parts.append(f"no_{name}")
        return "-".join(parts)


def vary(problem: Problem, **changes) -> Problem:
    return replace(problem, **changes)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor; numpy has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.detach().contiguous().numpy()


class Solution:
    """Random inputs of a problem, quantised to its types, and what float64 autograd says to them.

    Tensors of x's shape are (n, c, s) here; `pack` and `unpack` go between that and the memory
    layout and type that a kernel sees.
    """

    def __init__(self, p: Problem, seed: int = 0):
        self.p = p
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, dtype, offset=0.0, scale=1.0):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (offset + scale * value).to(DTYPES[dtype]).double()

        def normalised():
            u = F.leaky_relu(self.x, p.negative_slope) if p.activation_first else self.x
            if p.training:
                mean = u.mean((0, 2))
                var = (u - mean[:, None]).square().mean((0, 2))
            else:
                mean, var = self.statistics
            z = (u - mean[:, None]) / (var + p.eps).sqrt()[:, None]
            return torch.stack([mean, var]), z * self.weight[:, None] + self.bias[:, None]

        shape = (p.n, p.c, p.s)
        self.x = random(*shape, dtype=p.dtype, offset=p.mean, scale=p.std)
        if p.affine:
            self.weight = random(p.c, dtype=p.parameter_dtype, offset=1.0, scale=0.3)
            self.bias = random(p.c, dtype=p.parameter_dtype, scale=0.3)
        else:
            self.weight, self.bias = torch.ones(p.c).double(), torch.zeros(p.c).double()
        self.statistics = torch.stack(
            [
                random(p.c, dtype=p.accumulator, scale=0.3),
                random(p.c, dtype=p.accumulator).abs() + 0.5,
            ]
        )
        if p.activation_first and p.n * p.s > 0:
            self.x[0, :, 0] = 0  # where the derivative is the slope
        else:
            # Keep away from the kink, on whose side rounding would decide.
            for _ in range(20):
                close = normalised()[1].abs() < 1e-3
                if not close.any():
                    break
                self.x[close] = (self.x[close] + 0.0625).to(DTYPES[p.dtype]).double()
            else:
                raise AssertionError("could not keep x away from the kink")
        if p.training:
            self.statistics = normalised()[0]

        self.grad_y = random(*shape, dtype=p.dtype)
        self.grad_grad_x = random(*shape, dtype=p.dtype)
        self.grad_grad_weight = random(p.c, dtype=p.accumulator)
        self.grad_grad_bias = random(p.c, dtype=p.accumulator)

    def forward(self, x, weight, bias):
        p = self.p
        mean, var = (None, None) if p.training else self.statistics
        if p.activation_first:
            x = F.leaky_relu(x, p.negative_slope)
        # Not F.batch_norm, which refuses one element per channel.
        y = torch.batch_norm(x, weight, bias, mean, var, p.training, 0.0, p.eps, False)
        return y if p.activation_first else F.leaky_relu(y, p.negative_slope)

    def solve(self, with_parameter_tangents: bool = True) -> dict[str, torch.Tensor]:
        """Every result by its name in the kernels' parameters."""
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, self.weight, self.bias))
        grad_y = self.grad_y.clone().requires_grad_()
        y = self.forward(x, weight, bias)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(
            y, (x, weight, bias), grad_y, create_graph=True
        )
        scalar = (grad_x * self.grad_grad_x).sum()
        if with_parameter_tangents:
            scalar = scalar + (grad_weight * self.grad_grad_weight).sum()
            scalar = scalar + (grad_bias * self.grad_grad_bias).sum()
        second = torch.autograd.grad(scalar, (grad_y, x, weight), allow_unused=True)
        zeros = (torch.zeros_like(t) for t in (grad_y, x, weight))
        second = [z if t is None else t for t, z in zip(second, zeros, strict=True)]

        mean, var = self.statistics[:, :, None]
        u = F.leaky_relu(self.x, self.p.negative_slope) if self.p.activation_first else self.x
        xhat = (u - mean) / (var + self.p.eps).sqrt()
        slope, one = self.p.negative_slope, torch.ones((), dtype=torch.float64)
        if self.p.activation_first:
            v = self.grad_grad_x * torch.where(self.x > 0, one, slope)
            g = self.grad_y
        else:
            v = self.grad_grad_x
            z = xhat * self.weight[:, None] + self.bias[:, None]
            g = self.grad_y * torch.where(z > 0, one, slope)
        terms = [g, g * xhat, v, v * xhat, v * g]
        return {
            "y": y,
            "statistics": self.statistics,
            "grad_x": grad_x,
            "sums": torch.stack([g.sum((0, 2)), (g * xhat).sum((0, 2))]),
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
            "double_sums": torch.stack([t.sum((0, 2)) for t in terms]),
            "grad_grad_y": second[0],
            "double_grad_x": second[1],
            "double_grad_weight": second[2],
            "magnitude": torch.stack([t.abs().sum((0, 2)) for t in terms]),
        }

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        if self.p.channels_last:
            tensor = tensor.transpose(1, 2)
        return to_numpy(tensor.contiguous().to(DTYPES[self.p.dtype]))

    def unpack(self, array: np.ndarray) -> torch.Tensor:
        p = self.p
        tensor = torch.from_numpy(array)
        if p.dtype == "bfloat16":
            tensor = tensor.view(torch.bfloat16)
        tensor = tensor.double()
        if p.channels_last:
            return tensor.reshape(p.n, p.s, p.c).transpose(1, 2)
        return tensor.reshape(p.n, p.c, p.s)

    def parameters(self) -> dict[str, np.ndarray]:
        if not self.p.affine:
            return {}
        dtype = DTYPES[self.p.parameter_dtype]
        return {
            "weight": to_numpy(self.weight.to(dtype)),
            "bias": to_numpy(self.bias.to(dtype)),
        }

    def per_channel(self, tensor: torch.Tensor) -> np.ndarray:
        return to_numpy(tensor.to(DTYPES[self.p.accumulator]))

    def empty(self) -> np.ndarray:
        """An output of x's shape, full of NaNs."""
        return self.pack(torch.full_like(self.x, torch.nan))

    def empty_per_channel(self, *shape: int) -> np.ndarray:
        return self.per_channel(torch.full((*shape, self.p.c), torch.nan))


def check(problem: Problem, name: str, got: torch.Tensor, want: torch.Tensor, scale=None) -> None:
    """Every element within one rounding of float64, apart from what float32 computes.

    `scale` is what errors in the accumulation type are relative to; by default the root mean
    square.
    """
    assert got.shape == want.shape, (name, got.shape, want.shape)
    if want.numel() == 0:
        return
    if scale is None:
        scale = want.square().mean().sqrt()
    dtype = problem.dtype if want.dim() == 3 else problem.accumulator
    allowed = ROUNDING[dtype] * want.abs() + 3 * COMPUTED[problem.dtype] * scale + 1e-30
    # Where float16 has subnormals: half the distance between them.
    if dtype == "float16":
        allowed = allowed + 2.0**-25
    error = (got.double() - want).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} of {problem}: {int(wrong.sum())} of {want.numel()} elements, first {index}: "
            f"{got[index].item()!r} instead of {want[index].item()!r}"
        )
