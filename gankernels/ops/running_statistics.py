"""The running statistics of batch norm: counts batches, updates mean and variance in place."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.ops.kernel import kernel

_update = kernel("update_running_statistics", lambda *arguments: None)


def _counts_in_kernel(num_batches_tracked: Tensor, running_mean: Tensor) -> bool:
    """Whether the counter is as PyTorch's layers create it. A network that was cast as a whole, or
    a converted checkpoint, has other counters."""
    return (
        num_batches_tracked.dtype is torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == running_mean.device
    )


def count_up(num_batches_tracked: Tensor, momentum: float | None) -> float:
    """Counts a batch and returns the momentum, as PyTorch's layers do, for any kind of counter."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


def update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Updates the running statistics from those of a batch with `count` elements per channel."""
    if num_batches_tracked is not None and not _counts_in_kernel(num_batches_tracked, running_mean):
        momentum, num_batches_tracked = count_up(num_batches_tracked, momentum), None
    _update(running_mean, running_var, num_batches_tracked, statistics, momentum, count)


@torch.no_grad()
def update_from_all(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    count: Tensor,
) -> None:
    """The same for the batches of all processes, whose `count` the host need not know."""
    share: float | Tensor | None = momentum
    if num_batches_tracked is not None:
        if momentum is None and _counts_in_kernel(num_batches_tracked, running_mean):
            share = 1 / num_batches_tracked.add_(1).to(statistics.dtype)
        else:
            share = count_up(num_batches_tracked, momentum)
    assert share is not None
    mean, var = statistics
    unbiased = var * (count / (count - 1).clamp_(min=1))
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running.to(value.dtype).lerp(value, share))
