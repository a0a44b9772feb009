"""The penalty on the per-sample norms of a batch of gradients, differentiable twice.

The schemas are in csrc/ops/gradient_norm_penalty.cpp, the formulas in
csrc/kernels/gradient_norm_penalty.h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops.autograd import define_op
from gankernels.ops.kernel import accumulation_dtype, kernel
from gankernels.ops.record import FORWARD, KERNEL_PASSES, Inputs, Op, Traffic

TWO_SIDED, ONE_SIDED, SQUARED = range(3)

# The kernels' number for each public kind.
KINDS = {
    "wgan-gp": TWO_SIDED,
    "wgan-lp": ONE_SIDED,
    "dragan": TWO_SIDED,
    "r1": SQUARED,
    "r2": SQUARED,
}


def _squared_norms(grad: Tensor) -> Tensor:
    wide = grad if grad.dtype == torch.float64 else grad.float()
    return wide.flatten(1).square().sum(1) if grad.dim() > 1 else wide.square()


def reference(grad: Tensor, kind: int, center: float) -> Tensor:
    """The op in plain PyTorch: the tests compare with it, and it runs where there is no kernel."""
    squared = _squared_norms(grad)
    if kind == SQUARED:
        return squared.mean()
    # The root's derivative at zero is infinite; the inner `where` keeps it out of the graph.
    zero = squared == 0
    norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    excess = norm - center
    return (excess.clamp(min=0) if kind == ONE_SIDED else excess).square().mean()


def _has_dense_samples(grad: Tensor) -> bool:
    """Whether the kernels read grad without a copy, as with_dense_samples() in csrc/ops decides."""
    block, found = 1, True
    while found:
        found = False
        for size, stride in zip(grad.shape[1:], grad.stride()[1:], strict=True):
            if size != 1 and stride == block:
                block *= size
                found = True
    samples = grad.shape[0]
    return block * samples == grad.numel() and (samples <= 1 or grad.stride(0) == block)


def _like(grad: Tensor) -> Tensor:
    strides = grad.stride() if _has_dense_samples(grad) else grad.contiguous().stride()
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)


class Options(NamedTuple):
    kind: int
    center: float


def _penalty_like(grad: Tensor) -> Tensor:
    return grad.new_empty((), dtype=accumulation_dtype(grad))


_forward = kernel(
    "gradient_norm_penalty",
    lambda grad, *options: (
        _penalty_like(grad),
        grad.new_empty((grad.shape[0],), dtype=accumulation_dtype(grad)),
    ),
)
_backward = kernel(
    "gradient_norm_penalty_backward",
    lambda grad_penalty, grad, squared_norms, *options: _like(grad),
)
_double_backward = kernel(
    "gradient_norm_penalty_double_backward",
    lambda tangent, grad_penalty, grad, squared_norms, *options: (_penalty_like(grad), _like(grad)),
)

fused = define_op(
    "gradient_norm_penalty",
    forward=lambda grad, options: _forward(grad, *options),
    saves=lambda inputs, outputs: (*inputs, outputs[1]),
    backward=lambda grad_penalty, grad, squared_norms, options, wanted: _backward(
        grad_penalty, grad, squared_norms, *options
    ),
    double_backward=lambda tangent, grad_penalty, grad, squared_norms, options, wanted: (
        _double_backward(tangent, grad_penalty, grad, squared_norms, *options)
    ),
)


def compute(grad: Tensor, kind: int, center: float) -> Tensor:
    """The op by its kernels, or by the reference if there are none."""
    if has_kernel(grad, "gradient_norm_penalty"):
        return fused.apply(grad, Options(kind, center))[0]
    return reference(grad, kind, center)


# ---- the records ---------------------------------------------------------------------------------


def _eager_penalty(grad: Tensor) -> Tensor:
    return (grad.flatten(1).float().norm(2, 1) - 1).square().mean()


def _eager_interpolation(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    factor = alpha.view(-1, *(1,) * (real.dim() - 1))
    return factor * real + (1 - factor) * fake


_SHAPES = ((64, 784), (64, 3, 64, 64), (256, 3, 128, 128))
_HALF = (torch.float32, torch.bfloat16)

OPS = {
    "gradient_norm_penalty": Op(
        "gradient_norm_penalty",
        inputs=lambda shape, draw: (draw(*shape, scale=2 / math.prod(shape[1:]) ** 0.5),),
        public=lambda gk, grad: gk.functional.gradient_norm_penalty(grad),
        eager=_eager_penalty,
        fused=fused,
        options=lambda shape: Options(TWO_SIDED, 1.0),
        kernel_reference=lambda grad, kind, center: [
            reference(grad, kind, center),
            _squared_norms(grad),
        ],
        samples=((3, 43), (2, 40_001), (40, 8)),
        representative=((6, 3, 40, 41),),
        baselines="Eager: flatten, norm, square, mean. The penalty step ends with its second "
        "derivative.",
        traffic={
            "forward": Traffic(1, 1),
            "backward": Traffic(2, 2),
            "double backward": Traffic(3, 5),
        },
        penalty_tensors=1 + 2 + 3,
        work=lambda shape: (2 * math.prod(shape), math.prod(shape)),
        measured=tuple(Inputs(shape, _HALF) for shape in _SHAPES),
        measured_quickly=tuple(Inputs(shape) for shape in _SHAPES[:2]),
        measured_on_gpu=tuple(
            Inputs(shape, passes=KERNEL_PASSES) for shape in (*_SHAPES[:2], (256, 3, 512, 512))
        ),
    ),
    "interpolate": Op(
        "interpolate",
        inputs=lambda shape, draw: (
            draw(*shape),
            draw(*shape),
            torch.rand(shape[0], device=draw.drawn_on).to(draw.device, draw.dtype),
        ),
        public=lambda gk, real, fake, alpha: gk.functional.interpolate(real, fake, alpha),
        eager=_eager_interpolation,
        samples=((5, 3, 7),),
        representative=((6, 3, 8, 8),),
        baselines="Eager: a * real + (1 - a) * fake.",
        traffic={"forward": Traffic(3, 3)},
        work=lambda shape: (3 * math.prod(shape), 3 * math.prod(shape)),
        measured=tuple(Inputs(shape, passes=(FORWARD,)) for shape in _SHAPES),
        measured_quickly=tuple(Inputs(shape, passes=(FORWARD,)) for shape in _SHAPES[:2]),
        measured_on_gpu=(Inputs((256, 3, 512, 512), passes=(FORWARD,)),),
    ),
}
