"""batch_norm_leaky_relu with the statistics of the batches of all processes, in training.

Everything is a pass of partial sums, one collective, and a pass that uses the whole sums. How many
elements are behind them is known on the device only, so that the host need not wait for it: kernels
are given means for sums, and 1 for the count. An empty batch takes part with sums of zero.

Weights and biases are the same in all processes, and their gradients remain those of each process'
own part, so that adding them up over processes (or DistributedDataParallel) gives the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from gankernels.ops.autograd import differentiable, no_third_derivative
from gankernels.ops.batch_norm_leaky_relu import count, count_up, counts_in_kernel
from gankernels.ops.collectives import stack_of_all, sum_of_all
from gankernels.ops.fake import accumulation_dtype

_ops = torch.ops.gankernels


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    negative_slope: float,
    activation_first: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch, for whatever device and derivative."""

    def per_channel(t: Tensor) -> Tensor:
        return t.view(-1, *(1,) * (x.dim() - 2))

    u = F.leaky_relu(x, negative_slope) if activation_first else x
    u = u.to(accumulation_dtype(x))
    others = [d for d in range(x.dim()) if d != 1]
    total = sum_of_all(u.new_full((1,), count(x)), group).clamp(min=1)
    mean = sum_of_all(u.sum(others), group) / total
    centred = u - per_channel(mean)
    var = sum_of_all(centred.square().sum(others), group) / total
    z = centred * per_channel(torch.rsqrt(var + eps))
    if weight is not None:
        z = z * per_channel(weight)
    if bias is not None:
        z = z + per_channel(bias)
    z = z.to(x.dtype)
    y = z if activation_first else F.leaky_relu(z, negative_slope)
    return y, torch.stack((mean, var)).detach(), total


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    total: Tensor,
) -> None:
    """As the op of this name, with a count that the host need not know."""
    share = momentum
    if num_batches_tracked is not None:
        if momentum is None and counts_in_kernel(num_batches_tracked, running_mean):
            share = 1 / num_batches_tracked.add_(1).to(statistics.dtype)
        else:
            share = count_up(num_batches_tracked, momentum)
    mean, var = statistics
    unbiased = var * (total / (total - 1).clamp_(min=1))
    for running, value in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(running.to(value.dtype).lerp(value, share))


def _partial_sums(op, x: Tensor, rows: int, *arguments) -> Tensor:
    """(rows, C) from an op, or zeros where there is nothing to add up."""
    if x.numel() == 0:
        return x.new_zeros((rows, x.shape[1]), dtype=accumulation_dtype(x))
    return op(*arguments)


# ---- forward: (x, weight, bias, eps, negative_slope, activation_first, group)
#      -> (y, statistics, total), the last being the elements per channel, (1,)


def _forward(x, weight, bias, eps, negative_slope, activation_first, group):
    own = _partial_sums(
        _ops.batch_norm_leaky_relu_statistics.default, x, 2, x, negative_slope, activation_first
    )
    c = x.shape[1]
    all_ = stack_of_all(torch.cat((own.flatten(), own.new_full((1,), count(x)))), group)
    means, variances, counts = all_.split((c, c, 1), 1)
    # Chan's formula for any number of parts: what lies between their means belongs to the variance.
    total = counts.sum(0).clamp_(min=1)
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    statistics = torch.stack((mean, var))
    if x.numel() == 0:
        return torch.empty_like(x), statistics, total
    y, _ = _ops.batch_norm_leaky_relu.default(
        x, weight, bias, statistics, eps, negative_slope, activation_first
    )
    return y, statistics, total


def _forward_context(ctx, inputs, outputs) -> None:
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*inputs[:3], *outputs[1:])
    ctx.options = inputs[3:]


def _forward_backward(ctx, grad_y, *_):
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x, sums = _backward(grad_y, *ctx.saved_tensors, *ctx.options)
    grad_bias, grad_weight = sums.unbind(0)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        *(None,) * 4,
    )


batch_norm_leaky_relu = differentiable(
    "SyncBatchNormLeakyReLU", _forward, _forward_context, _forward_backward, compilable=False
)


# ---- backward: (grad_y, x, weight, bias, statistics, total, eps, negative_slope, activation_first,
#      group) -> (grad_x, own sums = (grad_bias, grad_weight))


def _backward_compute(
    grad_y, x, weight, bias, statistics, total, eps, negative_slope, activation_first, group
):
    options = (eps, negative_slope, activation_first)
    tensors = (grad_y, x, weight, bias, statistics)
    own = _partial_sums(_ops.batch_norm_leaky_relu_backward_sums.default, x, 2, *tensors, *options)
    means = sum_of_all(own, group) / total
    if x.numel() == 0:
        return torch.empty_like(x), own
    grad_x, _ = _ops.batch_norm_leaky_relu_backward.default(
        *tensors, means, 1.0, True, *options, False
    )
    return grad_x, own


def _backward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward_backward(ctx, grad_grad_x, grad_sums):
    need_grad_y, need_x, need_weight, need_bias = ctx.needs_input_grad[:4]
    bias = ctx.saved_tensors[3]
    if grad_grad_x is None:
        grad_grad_x = torch.zeros_like(ctx.saved_tensors[1])
    grad_grad_bias, grad_grad_weight = (None, None) if grad_sums is None else grad_sums.unbind(0)
    grad_grad_y, grad_x, grad_weight = _double_backward(
        grad_grad_x, grad_grad_weight, grad_grad_bias, *ctx.saved_tensors, *ctx.options,
        need_grad_y, need_x,
    )  # fmt: skip
    return (
        grad_grad_y if need_grad_y else None,
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        torch.zeros_like(bias) if need_bias else None,  # it moves the mask only
        *(None,) * 6,
    )


_backward = differentiable(
    "SyncBatchNormLeakyReLUBackward", _backward_compute, _backward_context, _backward_backward
)


# ---- double backward: (grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias,
#      statistics, total, eps, negative_slope, activation_first, group, want_grad_grad_y,
#      want_grad_x) -> (grad_grad_y, grad_x, grad_weight)


def _double_backward_compute(
    grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, total, eps,
    negative_slope, activation_first, group, want_grad_grad_y, want_grad_x,
):  # fmt: skip
    options = (eps, negative_slope, activation_first)
    own = _partial_sums(
        _ops.batch_norm_leaky_relu_double_backward_sums.default, x, 5,
        grad_grad_x, grad_y, x, weight, bias, statistics, *options,
    )  # fmt: skip
    g, v, v_g = own[:2], own[2:4], own[4]  # g and v by themselves and times xhat
    # grad_grad_weight may differ between processes, as grad_weight does, so its products with g are
    # added up too.
    product = torch.zeros_like(g) if grad_grad_weight is None else grad_grad_weight * g
    means, mean_product = (sum_of_all(torch.cat((own, product)), group) / total).split((5, 2))
    invstd = torch.rsqrt(statistics[1] + eps)
    grad_weight = invstd * (v_g - (means[:2] * v).sum(0))
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x), grad_weight
    grad_grad_y, grad_x, _ = _ops.batch_norm_leaky_relu_double_backward.default(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, means,
        1.0, True, *options, want_grad_grad_y, want_grad_x,
    )  # fmt: skip
    if grad_grad_weight is not None and want_grad_x:
        # The kernel multiplies grad_grad_weight with the means of g, where means of the products
        # belong. The difference enters grad_x as the means do in a backward pass.
        difference = mean_product - grad_grad_weight * means[:2]
        correction, _ = _ops.batch_norm_leaky_relu_backward.default(
            torch.zeros_like(x), x, None, None, statistics, difference, 1.0, True, *options, False
        )
        grad_x += correction
    return grad_grad_y, grad_x, grad_weight


_double_backward = differentiable(
    "SyncBatchNormLeakyReLUDoubleBackward",
    _double_backward_compute,
    lambda ctx, inputs, outputs: None,
    no_third_derivative("batch_norm_leaky_relu"),
)
