"""Problems of the batch_norm_leaky_relu kernels, and their solutions in float64."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import harness
from .harness import DTYPES, Pass, Result, to_numpy


@dataclass(frozen=True)
class Problem(harness.Problem):
    n: int = 4
    c: int = 3
    s: int = 16
    channels_last: bool = False
    dtype: str = "float32"
    parameter_dtype: str = "float32"
    activation_first: bool = False
    training: bool = True
    parameters: bool = True
    affine: int = 0  # the size of the parameters; 0: c
    negative_slope: float = 0.2
    eps: float = 0.1  # large: otherwise few elements per channel are an ill-conditioned problem
    mean: float = 0.5
    std: float = 1.0
    misalignment: int = 0  # of every array, in elements
    device: int = 1

    @property
    def options(self) -> dict[str, Any]:
        affine, count = self.affine or self.c, float(self.n * self.s)
        changed = {"affine": affine, "count": count, "output_misalignment": self.misalignment}
        return super().options | changed


class Solution(harness.Solution):
    """Tensors of x's shape are (n, c, s) here, whatever their memory layout is."""

    element_dims = 3

    def __init__(self, p: Problem, seed: int = 0, *, parameter_tangents: bool = True):
        super().__init__(p, seed)
        shape, affine = (p.n, p.c, p.s), p.affine or p.c
        self.x = self.random(*shape, dtype=p.dtype, offset=p.mean, scale=p.std)
        self.weight, self.bias = torch.ones(affine).double(), torch.zeros(affine).double()
        if p.parameters:
            self.weight = self.random(affine, dtype=p.parameter_dtype, offset=1.0, scale=0.3)
            self.bias = self.random(affine, dtype=p.parameter_dtype, scale=0.3)
        mean = self.random(p.c, dtype=p.accumulator, scale=0.3)
        variance = self.random(p.c, dtype=p.accumulator).abs() + 0.5
        self.statistics = torch.stack([mean, variance])
        if p.activation_first and p.n * p.s > 0:
            self.x[0, :, 0] = 0  # where the derivative is the slope
        else:
            self._avoid_the_kink()
        if p.training:
            self.statistics = self._normalized()[0]

        self.grad_y = self.random(*shape, dtype=p.dtype)
        self.grad_grad_x = self.random(*shape, dtype=p.dtype)
        self.grad_grad_weight = self.random(affine, dtype=p.accumulator)
        self.grad_grad_bias = self.random(affine, dtype=p.accumulator)
        self.parameter_tangents = parameter_tangents

    def per_channel(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.repeat(self.p.c // max(1, len(parameter)))

    def _normalized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, and z."""
        u = F.leaky_relu(self.x, self.p.negative_slope) if self.p.activation_first else self.x
        mean, var = self.statistics
        if self.p.training:
            mean = u.mean((0, 2))
            var = (u - mean[:, None]).square().mean((0, 2))
        xhat = (u - mean[:, None]) / (var + self.p.eps).sqrt()[:, None]
        weight, bias = self.per_channel(self.weight), self.per_channel(self.bias)
        return torch.stack([mean, var]), xhat * weight[:, None] + bias[:, None]

    def _avoid_the_kink(self) -> None:
        """Moves x away from where rounding would decide on the side of zero that z is on."""
        for _ in range(20):
            close = self._normalized()[1].abs() < 1e-3
            if not close.any():
                return
            self.x[close] = (self.x[close] + 0.0625).to(DTYPES[self.p.dtype]).double()
        raise AssertionError("could not keep x away from the kink")

    def _forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        p = self.p
        mean, var = (None, None) if p.training else self.statistics
        if p.activation_first:
            x = F.leaky_relu(x, p.negative_slope)
        # Not F.batch_norm, which refuses one element per channel.
        y = torch.batch_norm(x, weight, bias, mean, var, p.training, 0.0, p.eps, False)
        return y if p.activation_first else F.leaky_relu(y, p.negative_slope)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        p = self.p
        weights, biases = self.per_channel(self.weight), self.per_channel(self.bias)
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, weights, biases))
        grad_y = self.grad_y.clone().requires_grad_()
        y = self._forward(x, weight, bias)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(
            y, (x, weight, bias), grad_y, create_graph=True
        )
        scalar = (grad_x * self.grad_grad_x).sum()
        if self.parameter_tangents:
            scalar = scalar + (grad_weight * self.per_channel(self.grad_grad_weight)).sum()
            scalar = scalar + (grad_bias * self.per_channel(self.grad_grad_bias)).sum()
        second = torch.autograd.grad(scalar, (grad_y, x, weight), allow_unused=True)
        zeros = (torch.zeros_like(t) for t in (grad_y, x, weight))
        grad_grad_y, second_x, second_weight = (
            z if t is None else t.detach() for t, z in zip(second, zeros, strict=True)
        )

        mean, var = self.statistics[:, :, None]
        u = F.leaky_relu(self.x, p.negative_slope) if p.activation_first else self.x
        xhat = (u - mean) / (var + p.eps).sqrt()
        slope, one = p.negative_slope, torch.ones((), dtype=torch.float64)
        g, v = self.grad_y, self.grad_grad_x
        if p.activation_first:
            v = v * torch.where(self.x > 0, one, slope)
        else:
            g = g * torch.where(xhat * weights[:, None] + biases[:, None] > 0, one, slope)
        terms = [g, g * xhat, v, v * xhat, v * g]
        sums = torch.stack([t.sum((0, 2)) for t in terms])

        # What cancels in the sums and in the derivatives is of these sizes.
        magnitude = 3 * torch.stack([t.abs().sum((0, 2)) for t in terms])
        invstd = (self.statistics[1] + p.eps).rsqrt()
        scale = 9 * (1 + weights.abs().max()) * (1 + invstd.max()) ** 2

        def result(want: torch.Tensor) -> Result:
            rms = want.square().mean().sqrt() if want.numel() > 0 else 0.0
            return Result(want.detach(), 3 * rms)

        statistics = {"statistics": result(self.statistics)} if p.training else {}
        parameters = ("weight", "bias") if p.parameters else ()
        inputs = ("x", *parameters, "statistics")
        tangents = ("grad_grad_weight", "grad_grad_bias") if self.parameter_tangents else ()
        return (
            Pass(
                "batch_norm_leaky_relu_forward",
                ("x", *parameters) if p.training else inputs,
                {**statistics, "y": result(y)},
            ),
            Pass(
                "batch_norm_leaky_relu_backward",
                (*inputs, "grad_y"),
                {
                    "sums": Result(sums[:2], magnitude[:2]),
                    "grad_x": Result(grad_x.detach(), scale),
                },
            ),
            Pass(
                "batch_norm_leaky_relu_double_backward",
                (*inputs, "grad_y", "grad_grad_x", *tangents),
                {
                    "sums": Result(sums, magnitude),
                    "grad_grad_y": Result(grad_grad_y, scale),
                    "grad_x": Result(second_x, scale),
                    "grad_weight": Result(second_weight, 3 * magnitude.amax(0)),
                },
            ),
        )

    def inputs(self, *names: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, options = super().inputs(*names)
        parameter_dtype = DTYPES[self.p.parameter_dtype]
        for name in {"weight", "bias"}.intersection(names):
            arrays[name] = to_numpy(getattr(self, name).to(parameter_dtype))
        return arrays, options

    def pack(self, tensor: torch.Tensor) -> np.ndarray:
        if tensor.dim() == 3 and self.p.channels_last:
            tensor = tensor.transpose(1, 2)
        return super().pack(tensor.contiguous())

    def unpack(self, array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        if like.dim() == 3 and self.p.channels_last:
            return super().unpack(array, like.transpose(1, 2)).transpose(1, 2)
        return super().unpack(array, like)
