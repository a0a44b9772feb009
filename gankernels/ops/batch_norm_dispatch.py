"""Chooses how batch_norm_leaky_relu is computed: by kernels, by PyTorch or by several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops import batch_norm_leaky_relu as single
from gankernels.ops import running_statistics
from gankernels.ops import sync_batch_norm_leaky_relu as sync
from gankernels.ops.batch_norm_leaky_relu import Options
from gankernels.ops.checks import check_batch_norm


def compute(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """The op with its arguments checked. ``num_batches_tracked`` is counted up in training; with
    ``momentum=None`` it makes the running statistics a cumulative average, without the host waiting
    for the device."""
    check_batch_norm(x, running_mean, running_var, weight, bias, options)
    momentum = options.momentum
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    averaging = options.training and running is not None
    if momentum is None and averaging and num_batches_tracked is None:
        raise TypeError("momentum must be a float, got None")
    if options.group is not None:
        op = sync.reference
        if has_kernel(x, "batch_norm_leaky_relu"):
            op = sync.fused.apply
        y, statistics, total = op(x, weight, bias, options)
        if running is not None:
            running_statistics.update_from_all(
                *running, num_batches_tracked, statistics, momentum, total
            )
        return y
    # PyTorch decides which empty batches are accepted, and with what result.
    if x.dim() < 2 or x.numel() == 0 or not has_kernel(x, "batch_norm_leaky_relu"):
        if averaging and num_batches_tracked is not None:
            momentum = running_statistics.count_up(num_batches_tracked, momentum)
        return single.reference(
            x, running_mean, running_var, weight, bias, options.training, momentum or 0.0,
            options.eps, options.negative_slope, options.activation_first,
        )  # fmt: skip
    if options.training:
        y, statistics = single.fused.apply(x, weight, bias, None, options)
        if running is not None:
            running_statistics.update(
                *running, num_batches_tracked, statistics, momentum, single.count(x)
            )
        return y
    assert running is not None  # as check_batch_norm requires in evaluation
    statistics = torch.stack(running)
    if statistics.dtype is not torch.float64 and statistics.dtype is not torch.float32:
        statistics = statistics.float()
    return single.fused.apply(x, weight, bias, statistics, options)[0]
