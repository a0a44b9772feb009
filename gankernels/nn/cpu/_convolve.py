"""Convolutions by oneDNN, with the derivative of the bias computed separately."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def convolve(
    convolution: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **kw: Any
) -> Tensor:
    """`convolution(x, weight, bias, **kw)`.

    oneDNN takes 1.5 times as long for the derivative of the weight if it also computes that of the
    bias.
    """
    if bias is None:
        return convolution(x, weight, **kw)
    return _BiasGradient.apply(convolution(x, weight, bias.detach(), **kw), bias)


class _BiasGradient(torch.autograd.Function):
    """y (N,C,H,W), to which the bias (C) was added outside of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(y)  # otherwise PyTorch forbids in-place operations on the result
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        # On some processors PyTorch sums half-precision tensors in half precision.
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad, grad.sum((0, 2, 3), dtype=wide)
