"""The minibatch standard deviation, differentiable twice.

The schemas are in csrc/ops/minibatch_stddev.cpp, the formulas in csrc/kernels/minibatch_stddev.h.
The kernels compute one number per group and feature map; PyTorch's ops expand these over samples
and space at almost no cost. Only x is saved for backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gankernels._library import has_kernel
from gankernels.ops.autograd import define_op
from gankernels.ops.kernel import accumulation_dtype, empty_like_dense, kernel
from gankernels.ops.record import BACKWARD, KERNEL_PASSES, PENALTY, Inputs, Op, Traffic

EPS = 1e-8  # added to the variance, for a finite derivative if all members of a group are equal


def _stddev(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    """The result of the kernels, (groups, num_channels), in plain PyTorch."""
    samples = x.shape[0]
    # In half precision EPS would vanish, and so would small deviations.
    half = x.dtype in (torch.bfloat16, torch.float16)
    y = (x.float() if half else x).reshape(samples, num_channels, -1)
    # Sample n belongs to group n % groups. If the groups have two sizes, the smaller ones are
    # padded with zeros, and the sums divided by the number of their members.
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
    return (variance + eps).sqrt().mean(-1)


def reference(x: Tensor, group_size: int, num_channels: int, eps: float = EPS) -> Tensor:
    """The op in plain PyTorch: the tests compare with it, and it runs where there is no kernel."""
    if x.numel() == 0:
        return x[:, :num_channels]
    return _feature_maps(_stddev(x, group_size, num_channels, eps), x)


def _groups(samples: int, group_size: int) -> int:
    return -(-samples // group_size)


def _feature_maps(stddev: Tensor, x: Tensor) -> Tensor:
    """Expands (groups, num_channels) to (N, num_channels, ...)."""
    shape, samples = list(x.shape), x.shape[0]
    groups, shape[1] = stddev.shape
    features = stddev.repeat(-(-samples // groups), 1)[:samples].to(x.dtype)
    return features.reshape(shape[:2] + [1] * len(shape[2:])).expand(shape)


class Options(NamedTuple):
    group_size: int
    num_channels: int
    eps: float = EPS


def _stddev_like(x: Tensor, group_size: int, num_channels: int, eps: float) -> Tensor:
    return x.new_empty((_groups(x.shape[0], group_size), num_channels), dtype=accumulation_dtype(x))


_forward = kernel("minibatch_stddev", _stddev_like)
_backward = kernel(
    "minibatch_stddev_backward", lambda grad_stddev, x, *options: empty_like_dense(x)
)
_double_backward = kernel(
    "minibatch_stddev_double_backward",
    lambda tangent, grad_stddev, x, *options: (_stddev_like(x, *options), empty_like_dense(x)),
)

fused = define_op(
    "minibatch_stddev",
    forward=lambda x, options: _forward(x, *options),
    backward=lambda grad_stddev, x, options, wanted: _backward(grad_stddev, x, *options),
    double_backward=lambda tangent, grad_stddev, x, options, wanted: _double_backward(
        tangent, grad_stddev, x, *options
    ),
)


def compute(x: Tensor, group_size: int, num_channels: int) -> Tensor:
    """The op by its kernels, or by the reference if there are none."""
    if x.numel() and has_kernel(x, "minibatch_stddev"):
        return _feature_maps(fused.apply(x, Options(group_size, num_channels)), x)
    return reference(x, group_size, num_channels)


# ---- the record ----------------------------------------------------------------------------------

_HALF = (torch.float32, torch.bfloat16)

OPS = {
    "minibatch_stddev": Op(
        "minibatch_stddev",
        inputs=lambda shape, draw: (draw(*shape),),
        public=lambda gk, x: gk.functional.minibatch_stddev(x, 4),
        eager=lambda x: reference(x, 4, 1),
        fused=fused,
        # The kernels keep the members of a group in registers if there are up to four.
        options=lambda shape: Options(4 if len(shape) > 2 else 8, 1),
        kernel_reference=lambda *arguments: [_stddev(*arguments)],
        samples=((7, 4, 3, 3), (6, 3, 5), (4, 2, 70, 70), (4, 3, 53, 53), (17, 36), (9, 7)),
        representative=((10, 4, 4, 4), (4, 3, 64, 64)),  # one block for a group, and several
        baselines="Eager: the same in PyTorch's ops.",
        traffic={
            "forward": Traffic(1, 1),
            "backward": Traffic(2, 2),
            "double backward": Traffic(3, 3),
        },
        penalty_tensors=1 + 2 + 1 + 2 + 3,
        work=lambda shape: (4 * math.prod(shape), math.prod(shape)),
        measured=tuple(
            Inputs(shape, _HALF) for shape in ((64, 512, 4, 4), (16, 512, 8, 8), (64, 256, 16, 16))
        ),
        measured_quickly=(Inputs((64, 512, 4, 4)), Inputs((32, 256, 16, 16))),
        measured_on_gpu=(
            Inputs((64, 512, 4, 4), passes=KERNEL_PASSES),
            Inputs((64, 64, 128, 128), passes=KERNEL_PASSES),
            Inputs((64, 512, 4, 4), passes=(BACKWARD,)),
            Inputs((64, 512, 4, 4), (torch.bfloat16,), passes=(PENALTY,)),
        ),
    )
}
