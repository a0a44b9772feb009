"""The penalty on the per-sample norms of a batch of gradients, differentiable twice.

The schemas are in csrc/ops/gradient_norm_penalty.cpp, the formulas in
csrc/kernels/gradient_norm_penalty.h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops.autograd import define_op
from gankernels.ops.kernel import accumulation_dtype, kernel

TWO_SIDED, ONE_SIDED, SQUARED = range(3)

# The kernels' number for each public kind.
KINDS = {
    "wgan-gp": TWO_SIDED,
    "wgan-lp": ONE_SIDED,
    "dragan": TWO_SIDED,
    "r1": SQUARED,
    "r2": SQUARED,
}


def reference(grad: Tensor, kind: int, center: float) -> Tensor:
    """The op in plain PyTorch: the tests compare with it, and it runs where there is no kernel."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    squared = wide.flatten(1).square().sum(1) if grad.dim() > 1 else wide.square()
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
    """The op by its kernels, or by the reference where there are none."""
    if has_kernel(grad, "gradient_norm_penalty"):
        return fused.apply(grad, Options(kind, center))[0]
    return reference(grad, kind, center)
