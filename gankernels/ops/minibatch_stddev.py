"""The minibatch standard deviation, differentiable twice.

The schemas stand in csrc/ops/minibatch_stddev.cpp, the formulas in
csrc/kernels/minibatch_stddev.h. The kernels compute one number per group and feature; what spreads
these over samples and space is PyTorch's, and costs next to nothing. Saved for backward is x alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels._library import LOADED
from gankernels.ops.autograd import differentiable, no_third_derivative
from gankernels.ops.fake import accumulation_dtype, empty_like_dense, register_fake

_ops = torch.ops.gankernels

EPS = 1e-8  # added to the variance, for a finite derivative where all members of a group agree


def reference(x: Tensor, group_size: int, num_channels: int, eps: float = EPS) -> Tensor:
    """The op in plain PyTorch: the oracle of the tests, and what runs where there is no kernel."""
    if x.numel() == 0:
        return x[:, :num_channels]
    samples = x.shape[0]
    # In half precision EPS would vanish, and so would small deviations.
    half = x.dtype in (torch.bfloat16, torch.float16)
    y = (x.float() if half else x).reshape(samples, num_channels, -1)
    # Sample n belongs to group n % groups. Where the groups are of two sizes, zeros fill up the
    # smaller ones, and the sums are divided by what is really there.
    groups = _groups(samples, group_size)
    members = -(-samples // groups)
    missing = groups * members - samples
    if missing:
        y = torch.cat((y, y.new_zeros((missing, y.shape[1], y.shape[2]))))
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
    return _feature_maps((variance + eps).sqrt().mean(-1), x)


def fused(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    """The same with kernels, for an x that is not empty."""
    return _feature_maps(minibatch_stddev(x, group_size, num_channels, EPS), x)


def _groups(samples: int, group_size: int) -> int:
    return -(-samples // group_size)


def _feature_maps(stddev: Tensor, x: Tensor) -> Tensor:
    """From (groups, num_channels) to (N, num_channels, ...), expanded."""
    shape, samples = list(x.shape), x.shape[0]
    groups, shape[1] = stddev.shape
    features = stddev.repeat(-(-samples // groups), 1)[:samples].to(x.dtype)
    return features.reshape(shape[:2] + [1] * len(shape[2:])).expand(shape)


# ---- forward: (x, group_size, num_channels, eps) -> stddev


def _forward(x, group_size, num_channels, eps):
    return _ops.minibatch_stddev.default(x, group_size, num_channels, eps)


def _forward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _forward_backward(ctx, grad_stddev):
    if grad_stddev is None:
        return (None,) * 4
    return _backward(grad_stddev, *ctx.saved_tensors, *ctx.options), None, None, None


minibatch_stddev = differentiable("MinibatchStddev", _forward, _forward_context, _forward_backward)


# ---- backward: (grad_stddev, x, group_size, num_channels, eps) -> grad_x


def _backward_compute(grad_stddev, x, group_size, num_channels, eps):
    return _ops.minibatch_stddev_backward.default(grad_stddev, x, group_size, num_channels, eps)


def _backward_context(ctx, inputs, outputs) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward_backward(ctx, tangent):
    if tangent is None:
        return (None,) * 5
    return *_double_backward(tangent, *ctx.saved_tensors, *ctx.options), None, None, None


_backward = differentiable(
    "MinibatchStddevBackward", _backward_compute, _backward_context, _backward_backward
)


# ---- double backward: (tangent, grad_stddev, x, group_size, num_channels, eps)
#      -> (grad_grad_stddev, grad_x)


def _double_backward_compute(tangent, grad_stddev, x, group_size, num_channels, eps):
    return _ops.minibatch_stddev_double_backward.default(
        tangent, grad_stddev, x, group_size, num_channels, eps
    )


_double_backward = differentiable(
    "MinibatchStddevDoubleBackward",
    _double_backward_compute,
    lambda ctx, inputs, outputs: None,
    no_third_derivative("minibatch_stddev"),
)


# ---- fake kernels ------------------------------------------------------------------------------


def _register_fakes() -> None:
    def stddev_like(x: Tensor, group_size: int, num_channels: int) -> Tensor:
        sizes = (_groups(x.shape[0], group_size), num_channels)
        return x.new_empty(sizes, dtype=accumulation_dtype(x))

    @register_fake("minibatch_stddev")
    def _(x, group_size, num_channels, eps):
        return stddev_like(x, group_size, num_channels)

    @register_fake("minibatch_stddev_backward")
    def _(grad_stddev, x, group_size, num_channels, eps):
        return empty_like_dense(x)

    @register_fake("minibatch_stddev_double_backward")
    def _(tangent, grad_stddev, x, group_size, num_channels, eps):
        return stddev_like(x, group_size, num_channels), empty_like_dense(x)


if LOADED:
    _register_fakes()
