"""Problems for batch_norm_leaky_relu in both orders, and their solutions by float64 autograd."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gankernels as gk
from gankernels.ops.batch_norm_leaky_relu import reference as plain

HALVES = (torch.bfloat16, torch.float16)
INPUTS = ("x", "weight", "bias")
TANGENTS = ("grad_y", "tangent_x", "tangent_weight", "tangent_bias")


def seeded(seed: int = 3) -> torch.Generator:
    """A generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def channels_last(x: Tensor) -> Tensor:
    """In the order N, spatial, C, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack((x, x), -1)[..., 0],
    "padded": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded_space": lambda x: x[..., :1].expand_as(x),
    "one_number": lambda x: x.flatten()[0].expand_as(x),
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (6, 5, 4, 5)
    activation_first: bool = False
    training: bool = True
    running: bool = True
    affine: bool = True
    negative_slope: float = 0.2
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    mean: float = 0.5
    std: float = 1.5
    seed: int = 0

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}".replace("torch.", ""))
        return "-".join(parts)


def cases(**choices) -> list[Case]:
    """Every combination of the choices that makes sense."""
    products = itertools.product(*choices.values())
    found = [Case(**dict(zip(choices, product, strict=True))) for product in products]
    return [c for c in found if c.training or c.running]


class Problem:
    """Random inputs of a case, quantised to its dtypes.

    No element lies so near to the kink of LeakyReLU that rounding could take it to the other side,
    where derivatives are others.
    """

    def __init__(self, case: Case, gradient_layout: str | None = None):
        self.case = case
        generator = seeded(case.seed)
        channels = case.shape[1]
        parameter_dtype = case.parameter_dtype or case.dtype

        def draw(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.running_mean = draw(channels, dtype=parameter_dtype) if case.running else None
        self.running_var = (
            draw(channels, dtype=parameter_dtype).square() + 0.5 if case.running else None
        )
        spread = torch.randn(channels, generator=generator, dtype=torch.float64).exp()
        x = draw(*case.shape, dtype=torch.float64) * case.std
        x = x * spread.reshape(-1, *(1,) * (len(case.shape) - 2)) + case.mean
        layout = LAYOUTS[case.layout]
        self.weight = draw(channels, dtype=parameter_dtype) if case.affine else None
        self.bias = draw(channels, dtype=parameter_dtype) if case.affine else None
        self.x = layout(self._off_the_kink(x.to(case.dtype)))
        outer = LAYOUTS[gradient_layout or case.layout]
        self.grad_y = outer(draw(*case.shape, dtype=case.dtype))
        self.tangent_x = outer(draw(*case.shape, dtype=case.dtype))
        self.tangent_weight = draw(channels, dtype=parameter_dtype)
        self.tangent_bias = draw(channels, dtype=parameter_dtype)

    def _off_the_kink(self, x: Tensor) -> Tensor:
        case = self.case
        if case.activation_first or case.layout.startswith(("expanded", "one")):
            return x
        for _ in range(20):
            z = plain(
                *(t if t is None else t.double() for t in (
                    x, None if case.training else self.running_mean,
                    None if case.training else self.running_var, self.weight, self.bias,
                )), case.training, 0.0, case.eps, 1.0, False,
            )  # fmt: skip
            near = z.abs() < 1e-4
            if not near.any():
                break
            x = torch.where(near, x + 0.3 * case.std * torch.sign(x - case.mean).to(x.dtype), x)
        return x

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another dtype and on the CPU, where oracles are solved; its numbers
        are not rounded where the dtype is wider."""
        other = object.__new__(Problem)
        other.case = self.case.but(dtype=dtype, parameter_dtype=None)
        for name, value in vars(self).items():
            if name != "case":
                setattr(other, name, None if value is None else value.detach().to("cpu", dtype))
        return other


def ours(p: Problem, x: Tensor, weight: Tensor | None, bias: Tensor | None, **changes) -> Tensor:
    c = p.case.but(**changes)
    order = gk.functional.leaky_relu_batch_norm
    function = order if c.activation_first else gk.functional.batch_norm_leaky_relu
    return function(
        x, p.running_mean, p.running_var, weight, bias, c.training, c.momentum, c.eps,
        c.negative_slope,
    )  # fmt: skip


def reference(p: Problem, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    c = p.case
    return plain(
        x, p.running_mean, p.running_var, weight, bias, c.training, c.momentum, c.eps,
        c.negative_slope, c.activation_first,
    )  # fmt: skip


def solve(function: Callable, p: Problem) -> dict[str, Tensor]:
    """y, the first derivatives along grad_y, the second ones along tangents of those, and the
    running statistics afterwards."""
    inputs = {
        name: getattr(p, name).detach().requires_grad_()
        for name in INPUTS
        if getattr(p, name) is not None
    }
    grad_y = p.grad_y.detach().requires_grad_()
    kept = [None if t is None else t.clone() for t in (p.running_mean, p.running_var)]
    y = function(p, *(inputs.get(name) for name in INPUTS))
    results = {"y": y}
    if p.running_mean is not None:
        results |= {"running_mean": p.running_mean, "running_var": p.running_var}
        p.running_mean, p.running_var = kept
    first = torch.autograd.grad(y, inputs.values(), grad_y, create_graph=True)
    results |= {f"grad_{name}": g for name, g in zip(inputs, first, strict=True)}
    second = torch.autograd.grad(
        first,
        [*inputs.values(), grad_y],
        [getattr(p, f"tangent_{name}").to(g.dtype) for name, g in zip(inputs, first, strict=True)],
        materialize_grads=True,
    )
    results |= {f"second_{n}": g for n, g in zip((*inputs, "grad_y"), second, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).norm())


def assert_close(actual: dict, expected: dict, tolerance: float, floor: float = 0.0) -> None:
    """In norm, relative to the norm of what is expected or to `floor` times its square root of
    size, whichever is more; names what is too far off."""
    wrong = {}
    assert actual.keys() == expected.keys(), actual.keys()
    for name, value in expected.items():
        scale = max(float(value.double().norm()), floor * value.numel() ** 0.5)
        error = distance(actual[name], value)
        if not error <= tolerance * scale:
            wrong[name] = f"off by {error:.3g}, allowed {tolerance * scale:.3g}"
    assert not wrong, wrong


def assert_as_close_as_pytorch(actual: dict, pytorch: dict, expected: dict) -> None:
    """At most twice PyTorch's error in the same dtype, plus one rounding to that dtype."""
    wrong = {}
    for name, value in expected.items():
        rounding = torch.finfo(actual[name].dtype).eps / 2 * float(value.norm())
        allowed = 2 * distance(pytorch[name], value) + rounding
        error = distance(actual[name], value)
        if not error <= allowed:
            wrong[name] = f"off by {error:.3g}, allowed {allowed:.3g}"
    assert not wrong, wrong
