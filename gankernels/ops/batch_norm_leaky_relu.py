"""Batch normalisation fused with LeakyReLU, in either order, differentiable twice.

The schemas stand in csrc/ops/batch_norm_leaky_relu.cpp, the formulas in
csrc/kernels/batch_norm_leaky_relu_math.h. Saved for backward are x and the (2, C) statistics; the
activation's mask is recomputed. ``activation_first`` tells leaky_relu_batch_norm from
batch_norm_leaky_relu.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gankernels._library import LOADED
from gankernels.ops.autograd import differentiable, no_third_derivative
from gankernels.ops.fake import accumulation_dtype, empty_like_dense, register_fake

_ops = torch.ops.gankernels


def reference(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    activation_first: bool,
) -> Tensor:
    """The op in plain PyTorch: the oracle of the tests, and what runs where there is no kernel."""
    if activation_first:
        x = F.leaky_relu(x, negative_slope)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return y if activation_first else F.leaky_relu(y, negative_slope)


def count(x: Tensor) -> int:
    """The number of elements in a channel."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def counts_in_kernel(num_batches_tracked: Tensor, running_mean: Tensor) -> bool:
    """Whether the counter is what PyTorch's layers make. Others come from a network that was cast
    as a whole, or from a converted checkpoint."""
    return (
        num_batches_tracked.dtype is torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == running_mean.device
    )


def count_up(num_batches_tracked: Tensor, momentum: float | None) -> float:
    """Counts a batch and returns the momentum, as PyTorch's layers do, whatever the counter is."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    statistics: Tensor,
    momentum: float | None,
    n: int,
) -> None:
    """In place, by the statistics of n elements to a channel."""
    if num_batches_tracked is not None and not counts_in_kernel(num_batches_tracked, running_mean):
        momentum, num_batches_tracked = count_up(num_batches_tracked, momentum), None
    _ops.update_running_statistics.default(
        running_mean, running_var, num_batches_tracked, statistics, momentum, n
    )


# ---- forward: (x, weight, bias, statistics | None, eps, negative_slope, activation_first)
#      -> (y, statistics); without statistics they are taken from x, which is training mode


def _forward(x, weight, bias, statistics, eps, negative_slope, activation_first):
    return _ops.batch_norm_leaky_relu.default(
        x, weight, bias, statistics, eps, negative_slope, activation_first
    )


def _forward_context(ctx, inputs, outputs) -> None:
    x, weight, bias, given, eps, negative_slope, activation_first = inputs
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, outputs[1] if given is None else given)
    ctx.options = (count(x), given is None, eps, negative_slope, activation_first)


def _forward_backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    x, weight, bias, statistics = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_x, sums = _backward(
        grad_y, x, weight, bias, statistics, *ctx.options, need_weight or need_bias
    )
    grad_bias, grad_weight = sums.unbind(0) if need_weight or need_bias else (None, None)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,  # there may be a weight and no bias
        *(None,) * 4,
    )


batch_norm_leaky_relu = differentiable(
    "BatchNormLeakyReLU", _forward, _forward_context, _forward_backward
)


# ---- backward: (grad_y, x, weight, bias, statistics, count, training, eps, negative_slope,
#      activation_first, want_sums) -> (grad_x, sums = (grad_bias, grad_weight))


def _backward_compute(
    grad_y, x, weight, bias, statistics, n, training, eps, negative_slope, activation_first, want
):
    return _ops.batch_norm_leaky_relu_backward.default(
        grad_y, x, weight, bias, statistics, None, n, training, eps, negative_slope,
        activation_first, want,
    )  # fmt: skip


def _backward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:10]


def _backward_backward(ctx, grad_grad_x, grad_sums):
    if grad_grad_x is None and grad_sums is None:
        return (None,) * 11
    grad_y, x, weight, bias, statistics = ctx.saved_tensors
    need_grad_y, need_x, need_weight, need_bias = ctx.needs_input_grad[:4]
    if grad_grad_x is None:
        grad_grad_x = torch.zeros_like(x)
    grad_grad_bias, grad_grad_weight = (None, None) if grad_sums is None else grad_sums.unbind(0)
    grad_grad_y, grad_x, grad_weight = _double_backward(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics,
        *ctx.options, need_grad_y, need_x,
    )  # fmt: skip
    return (
        grad_grad_y if need_grad_y else None,
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        # The bias moves the mask only; PyTorch's ops say zero as well, which is not the same as
        # unused to autograd.grad and to optimisers.
        torch.zeros_like(bias) if need_bias else None,
        *(None,) * 7,
    )


_backward = differentiable(
    "BatchNormLeakyReLUBackward", _backward_compute, _backward_context, _backward_backward
)


# ---- double backward: (grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias,
#      statistics, count, training, eps, negative_slope, activation_first, want_grad_grad_y,
#      want_grad_x) -> (grad_grad_y, grad_x, grad_weight)


def _double_backward_compute(
    grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, n, training,
    eps, negative_slope, activation_first, want_grad_grad_y, want_grad_x,
):  # fmt: skip
    return _ops.batch_norm_leaky_relu_double_backward.default(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, None, n,
        training, eps, negative_slope, activation_first, want_grad_grad_y, want_grad_x,
    )  # fmt: skip


_double_backward = differentiable(
    "BatchNormLeakyReLUDoubleBackward",
    _double_backward_compute,
    lambda ctx, inputs, outputs: None,
    no_third_derivative("batch_norm_leaky_relu"),
)


# ---- fake kernels ------------------------------------------------------------------------------


def _per_channel(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, x.shape[1]), dtype=accumulation_dtype(x))


def _register_fakes() -> None:
    @register_fake("batch_norm_leaky_relu")
    def _(x, weight, bias, statistics, eps, negative_slope, activation_first):
        computed = x.new_empty((0,), dtype=accumulation_dtype(x))
        return empty_like_dense(x), _per_channel(x, 2) if statistics is None else computed

    @register_fake("batch_norm_leaky_relu_statistics")
    def _(x, negative_slope, activation_first):
        return _per_channel(x, 2)

    @register_fake("batch_norm_leaky_relu_backward")
    def _(grad_y, x, weight, bias, statistics, sums, count, training, eps, slope, first, want_sums):
        computed = sums is None and (want_sums or training)
        return empty_like_dense(x), _per_channel(x, 2 if computed else 0)

    @register_fake("batch_norm_leaky_relu_backward_sums")
    def _(grad_y, x, weight, bias, statistics, eps, negative_slope, activation_first):
        return _per_channel(x, 2)

    @register_fake("batch_norm_leaky_relu_double_backward")
    def _(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics, sums,
        count, training, eps, slope, first, want_grad_grad_y, want_grad_x,
    ):  # fmt: skip
        return (
            empty_like_dense(x) if want_grad_grad_y else x.new_empty((0,)),
            empty_like_dense(x) if want_grad_x else x.new_empty((0,)),
            _per_channel(x),
        )

    @register_fake("batch_norm_leaky_relu_double_backward_sums")
    def _(grad_grad_x, grad_y, x, weight, bias, statistics, eps, negative_slope, activation_first):
        return _per_channel(x, 5)

    @register_fake("update_running_statistics")
    def _(running_mean, running_var, num_batches_tracked, statistics, momentum, count):
        return None


if LOADED:
    _register_fakes()
