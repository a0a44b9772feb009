"""The penalty on the per-sample norms of a batch of gradients, differentiable twice.

The schemas stand in csrc/ops/gradient_norm_penalty.cpp, the formulas in
csrc/kernels/gradient_norm_penalty.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels._library import LOADED
from gankernels.ops.autograd import differentiable, no_third_derivative
from gankernels.ops.fake import accumulation_dtype, register_fake

_ops = torch.ops.gankernels

TWO_SIDED, ONE_SIDED, SQUARED = range(3)

# What each public kind is to the kernel.
KINDS = {
    "wgan-gp": TWO_SIDED,
    "wgan-lp": ONE_SIDED,
    "dragan": TWO_SIDED,
    "r1": SQUARED,
    "r2": SQUARED,
}


def reference(grad: Tensor, kind: int, center: float) -> Tensor:
    """The op in plain PyTorch: the oracle of the tests, and what runs where there is no kernel."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    squared = wide.flatten(1).square().sum(1) if grad.dim() > 1 else wide.square()
    if kind == SQUARED:
        return squared.mean()
    # The root's derivative at zero is infinite; the inner `where` keeps it out of the graph.
    zero = squared == 0
    norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    excess = norm - center
    return (excess.clamp(min=0) if kind == ONE_SIDED else excess).square().mean()


# ---- forward: (grad, kind, center) -> (penalty, squared_norms)


def _forward(grad, kind, center):
    return _ops.gradient_norm_penalty.default(grad, kind, center)


def _forward_context(ctx, inputs, outputs) -> None:
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], outputs[1])
    ctx.options = inputs[1:]


def _forward_backward(ctx, grad_penalty, _):
    if grad_penalty is None:
        return None, None, None
    return _backward(grad_penalty, *ctx.saved_tensors, *ctx.options), None, None


gradient_norm_penalty = differentiable(
    "GradientNormPenalty", _forward, _forward_context, _forward_backward
)


# ---- backward: (grad_penalty, grad, squared_norms, kind, center) -> grad_grad


def _backward_compute(grad_penalty, grad, squared_norms, kind, center):
    return _ops.gradient_norm_penalty_backward.default(
        grad_penalty, grad, squared_norms, kind, center
    )


def _backward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward_backward(ctx, tangent):
    if tangent is None:
        return (None,) * 5
    return *_double_backward(tangent, *ctx.saved_tensors, *ctx.options), None, None, None


_backward = differentiable(
    "GradientNormPenaltyBackward", _backward_compute, _backward_context, _backward_backward
)


# ---- double backward: (tangent, grad_penalty, grad, squared_norms, kind, center)
#      -> (grad_grad_penalty, grad_grad)


def _double_backward_compute(tangent, grad_penalty, grad, squared_norms, kind, center):
    return _ops.gradient_norm_penalty_double_backward.default(
        tangent, grad_penalty, grad, squared_norms, kind, center
    )


_double_backward = differentiable(
    "GradientNormPenaltyDoubleBackward",
    _double_backward_compute,
    lambda ctx, inputs, outputs: None,
    no_third_derivative("gradient_norm_penalty"),
)


# ---- fake kernels ------------------------------------------------------------------------------


def _has_dense_samples(grad: Tensor) -> bool:
    """Whether the ops take grad as it lies: the rule of with_dense_samples() in csrc/ops."""
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


def _register_fakes() -> None:
    @register_fake("gradient_norm_penalty")
    def _(grad, kind, center):
        dtype = accumulation_dtype(grad)
        return grad.new_empty((), dtype=dtype), grad.new_empty((grad.shape[0],), dtype=dtype)

    @register_fake("gradient_norm_penalty_backward")
    def _(grad_penalty, grad, squared_norms, kind, center):
        return _like(grad)

    @register_fake("gradient_norm_penalty_double_backward")
    def _(tangent, grad_penalty, grad, squared_norms, kind, center):
        return grad.new_empty((), dtype=accumulation_dtype(grad)), _like(grad)


if LOADED:
    _register_fakes()
