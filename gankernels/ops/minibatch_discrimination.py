"""Minibatch discrimination, differentiable twice, without a tensor of N x N x B x C.

The schemas stand in csrc/ops/minibatch_discrimination.cpp, the formulas in
csrc/kernels/minibatch_discrimination.h. Saved for backward is m alone: the similarities of all
pairs are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels._library import LOADED
from gankernels.ops.autograd import differentiable, no_third_derivative
from gankernels.ops.fake import register_fake

_ops = torch.ops.gankernels


def reference(m: Tensor) -> Tensor:
    """The op in plain PyTorch: the oracle of the tests, and what runs where there is no kernel."""
    distances = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(-1)  # (N, N, B)
    itself = torch.eye(m.shape[0], dtype=torch.bool, device=m.device).unsqueeze(-1)
    return torch.exp(-distances).masked_fill(itself, 0).sum(0)


# ---- forward: (m) -> o


def _forward(m):
    return _ops.minibatch_discrimination.default(m)


def _forward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _forward_backward(ctx, grad_o):
    return None if grad_o is None else _backward(grad_o, *ctx.saved_tensors)


minibatch_discrimination = differentiable(
    "MinibatchDiscrimination", _forward, _forward_context, _forward_backward
)


# ---- backward: (grad_o, m) -> grad_m


def _backward_compute(grad_o, m):
    return _ops.minibatch_discrimination_backward.default(grad_o, m)


def _backward_backward(ctx, grad_grad_m):
    if grad_grad_m is None:
        return None, None
    need_grad_o, need_m = ctx.needs_input_grad
    grad_grad_o, grad_m = _double_backward(grad_grad_m, *ctx.saved_tensors, need_m)
    return grad_grad_o if need_grad_o else None, grad_m if need_m else None


_backward = differentiable(
    "MinibatchDiscriminationBackward", _backward_compute, _forward_context, _backward_backward
)


# ---- double backward: (grad_grad_m, grad_o, m, want_grad_m) -> (grad_grad_o, grad_m)


def _double_backward_compute(grad_grad_m, grad_o, m, want_grad_m):
    return _ops.minibatch_discrimination_double_backward.default(
        grad_grad_m, grad_o, m, want_grad_m
    )


_double_backward = differentiable(
    "MinibatchDiscriminationDoubleBackward",
    _double_backward_compute,
    lambda ctx, inputs, outputs: None,
    no_third_derivative("minibatch_discrimination"),
)


# ---- fake kernels ------------------------------------------------------------------------------


def _register_fakes() -> None:
    @register_fake("minibatch_discrimination")
    def _(m):
        return m.new_empty(m.shape[:2])

    @register_fake("minibatch_discrimination_backward")
    def _(grad_o, m):
        return m.new_empty(m.shape)

    @register_fake("minibatch_discrimination_double_backward")
    def _(grad_grad_m, grad_o, m, want_grad_m):
        return m.new_empty(m.shape[:2]), m.new_empty(m.shape if want_grad_m else (0,))


if LOADED:
    _register_fakes()
