"""Matrix products in float32 by the faster of MKL and oneDNN."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class OneDNNProduct(torch.autograd.Function):
    """a (m,k), b (n,k) -> a @ b.T (m,n), differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            OneDNNProduct.apply(grad, b.t()) if ctx.needs_input_grad[0] else None,
            OneDNNProduct.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None,
        )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m,k), b (n,k) -> a @ b.T (m,n)."""
    if a.dtype == torch.float32 and onednn_is_faster():
        return OneDNNProduct.apply(a, b)
    return F.linear(a, b)


@cache
def onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 and is not Intel's.

    MKL, PyTorch's usual choice for float32, runs its AVX-512 kernels on Intel's processors only.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
