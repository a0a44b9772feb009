"""The minibatch standard deviation, of PyTorch's own ops, so differentiable to any order.

It has no kernel of its own yet: the layer stands where the feature map is smallest, at 4 x 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8  # added to the variance, for a finite derivative where all members of a group agree


def minibatch_stddev(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    if x.numel() == 0:
        return x[:, :num_channels]
    samples = x.shape[0]
    # In half precision EPS would vanish, and so would small deviations.
    half = x.dtype in (torch.bfloat16, torch.float16)
    y = (x.float() if half else x).reshape(samples, num_channels, -1)
    # Sample n belongs to group n % groups. Where the groups are of two sizes, zeros fill up the
    # smaller ones, and the sums are divided by what is really there.
    groups = -(-samples // group_size)
    members = -(-samples // groups)
    missing = groups * members - samples
    if missing:
        y = torch.cat((y, y.new_zeros(missing, *y.shape[1:])))
    y = y.reshape(members, groups, num_channels, -1)
    if missing:
        there = (torch.arange(groups * members, device=x.device) < samples).to(y.dtype)
        there = there.reshape(members, groups, 1, 1)
        count = there.sum(0)
        deviation = (y - y.sum(0) / count) * there
        variance = deviation.square().sum(0) / count
    else:
        # Not y.var(0), which takes ten times as long on a CPU.
        variance = (y - y.mean(0)).square().mean(0)
    stddev = (variance + EPS).sqrt().mean(-1)  # (groups, num_channels)
    features = stddev.repeat(members, 1)[:samples].to(x.dtype)
    space = x.shape[2:]
    return features.reshape(samples, num_channels, *(1,) * len(space)).expand(-1, -1, *space)
