"""A linear layer by oneDNN, with half-precision copies of its parameters if there are some."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from gankernels.nn._rewrite import call_in_trace
from gankernels.nn.cpu._eager import runs_on_cpu
from gankernels.nn.cpu._product import OneDNNProduct, onednn_is_faster


class HalfCopies(Protocol):
    """Half-precision copies of parameters, kept up to date by their owner."""

    dtype: torch.dtype | None

    def of(self, parameter: Tensor) -> Tensor:
        """The copy of this parameter, or the parameter itself if there is none."""


#: The copies that layers read under autocast; each thread has its own. See `train.half`.
half_copies: ContextVar[HalfCopies | None] = ContextVar("half_copies", default=None)


class OneDNNLinear(nn.Linear):
    """:class:`torch.nn.Linear` with products by oneDNN where MKL does not use AVX-512.

    On a Zen 5 such products of float32 matrices take half of MKL's time. Under autocast the layer
    uses half-precision copies of its parameters from `half_copies` if a trainer provides them:
    autocast would cast a frozen parameter again at every use, and every cast and its derivative is
    an additional operation.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
            if runs_on_cpu(input) and self.weight.dtype == torch.float32:
                return self._on_cpu(input)
        return F.linear(input, self.weight, self.bias)

    def _on_cpu(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled("cpu"):
            copies = half_copies.get()
            if copies is not None and copies.dtype == torch.get_autocast_dtype("cpu"):
                weight, bias = copies.of(weight), None if bias is None else copies.of(bias)
        elif input.dim() == 2 and input.dtype == torch.float32 and onednn_is_faster():
            product = OneDNNProduct.apply(input, weight)
            return product if bias is None else product + bias
        return F.linear(input, weight, bias)
