"""The minibatch standard deviation as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.ops.checks import check_floating
from gankernels.ops.minibatch_stddev import compute, reference


def minibatch_stddev(x: Tensor, group_size: int = 4, num_channels: int = 1) -> Tensor:
    """The feature maps of :class:`gankernels.nn.MinibatchStddev`, as defined there.

    Args:
        x: ``(N, C)`` or ``(N, C, ...)``, of float32, float64, bfloat16 or float16. Dense contiguous
            and channels_last tensors are read directly, others are copied first.
        group_size: the largest number of samples in a group.
        num_channels: the number of maps; C must be divisible by it.

    Returns:
        ``(N, num_channels)`` or ``(N, num_channels, ...)``, in ``x``'s dtype, constant over space
        (an expanded tensor).

    Raises:
        TypeError: if ``x`` is not a tensor of one of these dtypes.
        ValueError: if the channels of ``x`` are not divisible by ``num_channels``, or a number is
            below one.

    Derivatives: the first and the second, each by its own kernel; a third raises. Adding 1e-8 to
    the variance keeps both finite if all members of a group are equal. Half-precision inputs are
    converted to float32 for all sums, under autocast too.

    Reference: Karras et al., 2018, arXiv:1710.10196, section 3.
    """
    if not torch.jit.is_scripting():
        check_floating("x", x)
        if x.dim() < 2:
            raise ValueError(f"x must have shape (N, C) or (N, C, ...), got {tuple(x.shape)}")
        for name, value in (("group_size", group_size), ("num_channels", num_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if x.shape[1] == 0 or x.shape[1] % num_channels:
            raise ValueError(
                f"the channels of x must be divisible by num_channels={num_channels}, "
                f"got {x.shape[1]}"
            )
        return compute(x, group_size, num_channels)
    return reference(x, group_size, num_channels)
