"""The minibatch standard deviation as a layer of a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gankernels.functional import minibatch_stddev
from gankernels.nn._rewrite import call_in_trace


class MinibatchStddev(nn.Module):
    """Appends feature maps that measure how much the samples of a group differ.

    The batch is divided into groups; within a group, the standard deviation of every feature is
    taken over the samples and averaged over all features and positions. The resulting number is the
    value of a constant feature map, the same for all samples of the group.

    Args:
        group_size: samples per group, at most; see below.
        num_channels: maps to append. The channels are divided into as many runs of equal length,
            and each run is averaged into one map.

    Shape:
        - Input: ``(N, C)`` or ``(N, C, ...)``, C divisible by ``num_channels``
        - Output: ``(N, C + num_channels)`` or ``(N, C + num_channels, ...)``

    A batch of any size is accepted: there are ``ceil(N / group_size)`` groups, whose sizes differ
    by one at most, and sample n belongs to group n modulo their number. If N is a multiple of
    ``group_size``, this is Karras' rule. Groups are formed within the batch of one process; with
    several processes their size stays the same as long as each batch is a multiple of
    ``group_size``. Differentiable twice; details and errors:
    :func:`gankernels.functional.minibatch_stddev`.

    Reference: Karras et al., 2018, arXiv:1710.10196, section 3.
    """

    def __init__(self, group_size: int = 4, num_channels: int = 1) -> None:
        super().__init__()
        for name, value in (("group_size", group_size), ("num_channels", num_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript needs this condition alone)
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
        return torch.cat((input, minibatch_stddev(input, self.group_size, self.num_channels)), 1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, num_channels={self.num_channels}"
