"""Dropout with 16 random bits per element."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from gankernels.nn._rewrite import call_in_trace
from gankernels.nn.cpu._eager import runs_on_cpu


class BitDropout(nn.Dropout):
    """:class:`torch.nn.Dropout` that compares 16 random bits per element with ``p``.

    ``p`` is therefore rounded to a multiple of 2^-16. PyTorch draws each element of the mask from a
    Bernoulli distribution, which takes ten times as long: a tenth of a training step of a small
    dense network.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
            dropped = round(self.p * 2**16)
            if self.training and runs_on_cpu(input) and 0 < dropped < 2**16:
                return _drop(input, dropped)
        return F.dropout(input, self.p, self.training, self.inplace)


def _drop(x: Tensor, dropped: int) -> Tensor:
    """Zeros each element with probability `dropped / 2**16`, and scales the others."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, dropped - 2**15, out=bits)
    scale = 2**16 / (2**16 - dropped)
    if x.element_size() == 2:  # in place: ones become the bits of the scale
        return x * kept.mul_(_bits(scale, x.dtype)).view(x.dtype)
    return x * kept.to(x.dtype).mul_(scale)


@cache
def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(torch.int16).item())
