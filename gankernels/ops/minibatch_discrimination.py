"""Minibatch discrimination, differentiable twice, without a tensor of N x N x B x C.

The schemas are in csrc/ops/minibatch_discrimination.cpp, the formulas in
csrc/kernels/minibatch_discrimination.h. Only m is saved for backward: the derivatives recompute the
similarities of all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops.autograd import define_op
from gankernels.ops.kernel import kernel


def reference(m: Tensor) -> Tensor:
    """The op in plain PyTorch: the tests compare with it, and it runs where there is no kernel."""
    distances = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(-1)  # (N, N, B)
    itself = torch.eye(m.shape[0], dtype=torch.bool, device=m.device).unsqueeze(-1)
    return torch.exp(-distances).masked_fill(itself, 0).sum(0)


_forward = kernel("minibatch_discrimination", lambda m: m.new_empty(m.shape[:2]))
_backward = kernel("minibatch_discrimination_backward", lambda grad_o, m: m.new_empty(m.shape))
_double_backward = kernel(
    "minibatch_discrimination_double_backward",
    lambda grad_grad_m, grad_o, m, want_grad_m: (
        m.new_empty(m.shape[:2]),
        m.new_empty(m.shape if want_grad_m else (0,)),
    ),
)

fused = define_op(
    "minibatch_discrimination",
    forward=lambda m, options: _forward(m),
    saves=lambda inputs, outputs: inputs,
    backward=lambda grad_o, m, options, wanted: _backward(grad_o, m),
    double_backward=lambda grad_grad_m, grad_o, m, options, wanted: _double_backward(
        grad_grad_m, grad_o, m, wanted[1]
    ),
)


def compute(m: Tensor) -> Tensor:
    """The op by its kernels, or by the reference where there are none."""
    if has_kernel(m, "minibatch_discrimination"):
        return fused.apply(m, None)
    return reference(m)
