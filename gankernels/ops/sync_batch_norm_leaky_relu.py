"""batch_norm_leaky_relu with the statistics of the batches of all processes, in training.

Each derivative is a pass of partial sums, one collective, and a pass that uses the total sums. The
number of elements is known on the device only, so that the host need not wait for it: the kernels
get means instead of sums, and 1 for the count. An empty batch takes part with sums of zero.

Weights and biases are the same in all processes. Their gradients are those of each process's own
part, so that adding them up over processes (or DistributedDataParallel) gives the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gankernels.ops.autograd import Result, define_op
from gankernels.ops.batch_norm_leaky_relu import (
    Options,
    backward_kernel,
    backward_sums_kernel,
    count,
    double_backward_kernel,
    double_backward_sums_kernel,
    forward_kernel,
    statistics_kernel,
    zero_for_bias,
)
from gankernels.ops.collectives import stack_of_all, sum_of_all
from gankernels.ops.kernel import accumulation_dtype


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch, for any device and derivative."""
    group = options.group
    assert group is not None

    def per_channel(t: Tensor) -> Tensor:
        return t.view(-1, *(1,) * (x.dim() - 2))

    u = F.leaky_relu(x, options.negative_slope) if options.activation_first else x
    u = u.to(accumulation_dtype(x))
    others = [d for d in range(x.dim()) if d != 1]
    total = sum_of_all(u.new_full((1,), count(x)), group).clamp(min=1)
    mean = sum_of_all(u.sum(others), group) / total
    centered = u - per_channel(mean)
    var = sum_of_all(centered.square().sum(others), group) / total
    z = centered * per_channel(torch.rsqrt(var + options.eps))
    if weight is not None:
        z = z * per_channel(weight)
    if bias is not None:
        z = z + per_channel(bias)
    z = z.to(x.dtype)
    y = z if options.activation_first else F.leaky_relu(z, options.negative_slope)
    return y, torch.stack((mean, var)).detach(), total


def _partial_sums(
    kernel: Callable[..., Tensor], x: Tensor, rows: int, *arguments: object
) -> Tensor:
    """(rows, C) from a kernel, or zeros for an empty x."""
    if x.numel() == 0:
        return x.new_zeros((rows, x.shape[1]), dtype=accumulation_dtype(x))
    return kernel(*arguments)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the statistics, and the number of elements per channel, as a tensor (1,)."""
    assert options.group is not None
    own = _partial_sums(
        statistics_kernel, x, 2, x, options.negative_slope, options.activation_first
    )
    c = x.shape[1]
    all_ = stack_of_all(torch.cat((own.flatten(), own.new_full((1,), count(x)))), options.group)
    means, variances, counts = all_.split((c, c, 1), 1)
    # Chan's formula for any number of parts: the distances between means belong to the variance.
    total = counts.sum(0).clamp_(min=1)
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    statistics = torch.stack((mean, var))
    if x.numel() == 0:
        return torch.empty_like(x), statistics, total
    y, _ = forward_kernel(
        x, weight, bias, statistics,
        options.eps, options.negative_slope, options.activation_first,
    )  # fmt: skip
    return y, statistics, total


def _backward(
    grad_y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    total: Tensor,
    options: Options,
    wanted: tuple[bool, ...],
) -> Result:
    assert options.group is not None
    last = (options.eps, options.negative_slope, options.activation_first)
    tensors = (torch.zeros_like(x) if grad_y is None else grad_y, x, weight, bias, statistics)
    own = _partial_sums(backward_sums_kernel, x, 2, *tensors, *last)
    means = sum_of_all(own, options.group) / total
    if x.numel() == 0:
        grad_x = torch.empty_like(x)
    else:
        grad_x, _ = backward_kernel(*tensors, means, 1.0, True, *last, False)
    grad_bias, grad_weight = own.unbind(0)
    return grad_x, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None


def _double_backward(
    grad_grad_x: Tensor | None,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    total: Tensor,
    options: Options,
    wanted: tuple[bool, ...],
) -> Result:
    assert options.group is not None
    last = (options.eps, options.negative_slope, options.activation_first)
    if grad_grad_x is None:
        grad_grad_x = torch.zeros_like(x)
    own = _partial_sums(
        double_backward_sums_kernel, x, 5, grad_grad_x, grad_y, x, weight, bias, statistics, *last
    )
    g, v, v_g = own[:2], own[2:4], own[4]  # sums of g and v, alone and times xhat
    # grad_grad_weight may differ between processes, as grad_weight does, so its products with g are
    # added up too.
    product = torch.zeros_like(g) if grad_grad_weight is None else grad_grad_weight * g
    means, mean_product = (sum_of_all(torch.cat((own, product)), options.group) / total).split(
        (5, 2)
    )
    invstd = torch.rsqrt(statistics[1] + options.eps)
    grad_weight = invstd * (v_g - (means[:2] * v).sum(0)) if wanted[2] else None
    grad_bias = zero_for_bias(bias, wanted[3])
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x), grad_weight, grad_bias
    grad_grad_y, grad_x, _ = double_backward_kernel(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, means,
        1.0, True, *last, wanted[0], wanted[1],
    )  # fmt: skip
    if grad_grad_weight is not None and wanted[1]:
        # The kernel multiplies grad_grad_weight by the means of g instead of taking the means of
        # the products. The difference enters grad_x as the means do in a backward pass.
        difference = mean_product - grad_grad_weight * means[:2]
        correction, _ = backward_kernel(
            torch.zeros_like(x), x, None, None, statistics, difference, 1.0, True, *last, False
        )
        grad_x += correction
    return grad_grad_y, grad_x, grad_weight, grad_bias


fused = define_op(
    "sync_batch_norm_leaky_relu",
    forward=_forward,
    saves=lambda inputs, outputs: (*inputs, *outputs[1:]),
    backward=_backward,
    double_backward=_double_backward,
    collective=True,
)
