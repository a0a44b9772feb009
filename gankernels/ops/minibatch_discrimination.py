"""Minibatch discrimination, differentiable twice, without a tensor of N x N x B x C.

The schemas are in csrc/ops/minibatch_discrimination.cpp, the formulas in
csrc/kernels/minibatch_discrimination.h. Only m is saved for backward: the derivatives recompute the
similarities of all pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops.autograd import define_op
from gankernels.ops.kernel import kernel
from gankernels.ops.record import BACKWARD, KERNEL_PASSES, Inputs, Op, Shape


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
    backward=lambda grad_o, m, options, wanted: _backward(grad_o, m),
    double_backward=lambda grad_grad_m, grad_o, m, options, wanted: _double_backward(
        grad_grad_m, grad_o, m, wanted[1]
    ),
)


def compute(m: Tensor) -> Tensor:
    """The op by its kernels, or by the reference if there are none."""
    if has_kernel(m, "minibatch_discrimination"):
        return fused.apply(m, None)
    return reference(m)


# ---- the record ----------------------------------------------------------------------------------


def _broadcasting(m: Tensor) -> Tensor:
    return torch.exp(-(m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)).sum(0) - 1


def _cdist(m: Tensor) -> Tensor:
    kernels = m.transpose(0, 1)
    return (torch.exp(-torch.cdist(kernels, kernels, p=1)).sum(1) - 1).t()


def _additions(what: str, shape: Shape) -> int:
    """The number of additions. Each ordered pair and dimension takes one for the difference and one
    for the distance; in the derivatives one more for the signed sum of weights; in the second
    derivative two more for the tangent's difference and signed sum."""
    n, b, c = shape
    return {"forward": 2, "backward": 3, "double backward": 5}[what] * n * (n - 1) * b * c


_SHAPES = ((32, 100, 5), (64, 100, 5), (128, 100, 5), (256, 32, 16), (512, 100, 16))
_ON_GPU = ((128, 100, 5), (512, 100, 16), (1024, 100, 32), (4096, 32, 16), (1024, 32, 64))

OPS = {
    "minibatch_discrimination": Op(
        "minibatch_discrimination",
        inputs=lambda shape, draw: (draw(*shape, scale=0.3),),
        public=lambda gk, m: gk.functional.minibatch_discrimination(m),
        eager=_broadcasting,
        fused=fused,
        kernel_reference=lambda m: [reference(m)],
        samples=tuple((70, 3, c) for c in (2, 4, 5, 8, 12, 16, 24, 32, 40)),
        representative=((70, 9, 5), (70, 3, 40)),  # C in registers, and C in chunks
        baselines="Eager: broadcasting to N x N x B x C. Cdist: torch.cdist(p=1), differentiable "
        "once.",
        eager_elements=lambda shape: shape[0] * math.prod(shape),
        others={"cdist": _cdist},
        work=lambda shape: (
            shape[0] * (shape[0] - 1) * shape[1] * shape[2],
            shape[0] * shape[1] * (shape[2] + 1),
        ),
        additions=_additions,
        measured=tuple(map(Inputs, _SHAPES)),
        measured_quickly=tuple(map(Inputs, _SHAPES[:3])),
        measured_on_gpu=(
            *(Inputs(shape, passes=KERNEL_PASSES) for shape in _ON_GPU),
            *(Inputs(shape, passes=(BACKWARD,)) for shape in _ON_GPU[:2]),
        ),
    )
}
