"""Batch normalization fused with LeakyReLU, in either order, differentiable twice.

The schemas are in csrc/ops/batch_norm_leaky_relu.cpp, the formulas in
csrc/kernels/batch_norm_leaky_relu_math.h. Only x and the (2, C) statistics are saved for backward:
the derivatives recompute the activation's mask.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from gankernels.ops.autograd import Result, define_op
from gankernels.ops.kernel import accumulation_dtype, empty_like_dense, kernel
from gankernels.ops.record import (
    BACKWARD,
    KERNEL_PASSES,
    LAYOUTS,
    PENALTY,
    Draw,
    Inputs,
    Op,
    Shape,
    Traffic,
)


class Options(NamedTuple):
    """Everything about the op that is not a tensor.

    ``activation_first`` distinguishes leaky_relu_batch_norm from batch_norm_leaky_relu. With
    ``momentum=None`` the running statistics are a cumulative average. With a ``group``, which is
    for training only, the batch is that of all its processes.
    """

    training: bool
    momentum: float | None
    eps: float
    negative_slope: float
    activation_first: bool
    group: dist.ProcessGroup | None = None


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
    """The op in plain PyTorch: the tests compare with it, and it runs where there is no kernel."""
    if activation_first:
        x = F.leaky_relu(x, negative_slope)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return y if activation_first else F.leaky_relu(y, negative_slope)


def count(x: Tensor) -> int:
    """The number of elements in a channel."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


# ---- kernels. Those that take sums, or statistics, compute them if they are None. ----------------


def _per_channel(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, x.shape[1]), dtype=accumulation_dtype(x))


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=accumulation_dtype(x))


forward_kernel = kernel(
    "batch_norm_leaky_relu",
    lambda x, weight, bias, statistics, *options: (
        empty_like_dense(x),
        _per_channel(x, 2) if statistics is None else _nothing(x),
    ),
)
statistics_kernel = kernel(
    "batch_norm_leaky_relu_statistics", lambda x, *options: _per_channel(x, 2)
)
backward_kernel = kernel(
    "batch_norm_leaky_relu_backward",
    lambda grad_y, x, weight, bias, statistics, sums, count, training, *options: (
        empty_like_dense(x),
        _per_channel(x, 2 if sums is None and (options[-1] or training) else 0),
    ),
)
backward_sums_kernel = kernel(
    "batch_norm_leaky_relu_backward_sums", lambda grad_y, x, *options: _per_channel(x, 2)
)
double_backward_kernel = kernel(
    "batch_norm_leaky_relu_double_backward",
    lambda grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, *options: (
        empty_like_dense(x) if options[-2] else x.new_empty((0,)),
        empty_like_dense(x) if options[-1] else x.new_empty((0,)),
        _per_channel(x),
    ),
)
double_backward_sums_kernel = kernel(
    "batch_norm_leaky_relu_double_backward_sums",
    lambda grad_grad_x, grad_y, x, *options: _per_channel(x, 5),
)


# ---- passes --------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,  # None in training, where they are those of x
    options: Options,
) -> Result:
    return forward_kernel(
        x, weight, bias, statistics,
        options.eps, options.negative_slope, options.activation_first,
    )  # fmt: skip


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    options: Options,
    wanted: tuple[bool, ...],
) -> Result:
    want_sums = wanted[1] or wanted[2]
    grad_x, sums = backward_kernel(
        grad_y, x, weight, bias, statistics, None, count(x), options.training,
        options.eps, options.negative_slope, options.activation_first, want_sums,
    )  # fmt: skip
    if not want_sums:
        return grad_x, None, None
    grad_bias, grad_weight = sums.unbind(0)
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
    options: Options,
    wanted: tuple[bool, ...],
) -> Result:
    if grad_grad_x is None:
        grad_grad_x = torch.zeros_like(x)
    grad_grad_y, grad_x, grad_weight = double_backward_kernel(
        grad_grad_x, grad_grad_weight, grad_grad_bias, grad_y, x, weight, bias, statistics,
        None, count(x), options.training,
        options.eps, options.negative_slope, options.activation_first, wanted[0], wanted[1],
    )  # fmt: skip
    grad_bias = zero_for_bias(bias, wanted[3])
    return grad_grad_y, grad_x, grad_weight if wanted[2] else None, grad_bias


def zero_for_bias(bias: Tensor | None, wanted: bool) -> Tensor | None:
    """The second derivative by the bias, which moves the mask only. PyTorch's ops return zero as
    well, which differs from None for autograd.grad and optimizers."""
    return torch.zeros_like(bias) if bias is not None and wanted else None


fused = define_op(
    "batch_norm_leaky_relu",
    forward=_forward,
    saves=lambda inputs, outputs: (
        *inputs[:3],
        outputs[1] if inputs[3] is None else inputs[3],
    ),
    backward=_backward,
    double_backward=_double_backward,
)


# ---- the records ---------------------------------------------------------------------------------

_SLOPE = 0.2
_HALF = (torch.float32, torch.bfloat16)
_LARGE = ((64, 64, 8, 8), (128, 128, 14, 14), (64, 128, 32, 32))


def _inputs(shape: Shape, draw: Draw) -> tuple[Tensor, ...]:
    return draw(*shape), draw.constant(1.0, shape[1]), draw.constant(0.0, shape[1])


def _record(
    name: str,
    layer: str,
    activation_first: bool,
    baselines: str,
    **more: tuple[Shape, ...] | tuple[Inputs, ...],
) -> Op:
    def public(gk: ModuleType, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return getattr(gk.functional, name)(x, None, None, weight, bias, True)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(x, None, None, weight, bias, True, 0.1, 1e-5, _SLOPE, activation_first)

    def layer_for(gk: ModuleType, shape: Shape) -> nn.Module:
        dimensions = 1 if len(shape) == 2 else 2
        return getattr(gk.nn, f"{layer}{dimensions}d")(shape[1], negative_slope=_SLOPE)

    def eager_layer(shape: Shape) -> nn.Module:
        norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
        activation = nn.LeakyReLU(_SLOPE)
        return nn.Sequential(*((activation, norm) if activation_first else (norm, activation)))

    return Op(
        name,
        inputs=_inputs,
        public=public,
        eager=eager,
        fused=fused,
        options=lambda shape: Options(True, None, 1e-5, _SLOPE, activation_first),
        last_inputs=(None,),
        baselines=baselines,
        layer=layer_for,
        eager_layer=eager_layer,
        # The forward pass reads x and writes y; the backward pass reads x and grad_y and writes
        # grad_x; the double backward pass reads x, grad_y and v and writes two gradients.
        traffic={
            "forward": Traffic(2, 3),
            "backward": Traffic(3, 5),
            "double backward": Traffic(5, 8),
        },
        # The penalty reads grad_x, and reads it again to write v; the gradient of grad_y is not
        # needed.
        penalty_tensors=2 + 3 + 1 + 2 + 4,
        work=lambda shape: (7 * math.prod(shape), 2 * math.prod(shape)),
        **more,  # type: ignore[arg-type]
    )


OPS = {
    "batch_norm_leaky_relu": _record(
        "batch_norm_leaky_relu",
        "BatchNormLeakyReLU",
        False,
        "Eager: nn.BatchNorm, then nn.LeakyReLU.",
        samples=((5, 6, 4, 4), (3, 5, 7), (4, 3, 96, 97), (37, 40)),
        channels_last_samples=((5, 6, 4, 4), (3, 5, 7, 3), (60, 130, 9, 9)),
        # Whole channels to a block, channels divided among blocks, and rows.
        representative=((8, 5, 6, 6), (4, 3, 256, 256), (9001, 40)),
        measured=(
            Inputs((64, 256), _HALF),
            Inputs((64, 1024), _HALF),
            *(Inputs(shape, _HALF, LAYOUTS) for shape in _LARGE),
        ),
        measured_quickly=(
            Inputs((64, 256)),
            Inputs((64, 64, 8, 8)),
            Inputs((64, 128, 14, 14), layouts=LAYOUTS),
            Inputs((64, 128, 14, 14), (torch.bfloat16,)),
        ),
        measured_on_gpu=(
            Inputs((64, 128, 128, 128), _HALF, LAYOUTS, KERNEL_PASSES),
            Inputs((64, 128, 32, 32), _HALF, LAYOUTS, KERNEL_PASSES),
            Inputs((64, 256), passes=KERNEL_PASSES),
            Inputs((64, 128, 32, 32), _HALF, LAYOUTS, (BACKWARD, PENALTY)),
            Inputs((64, 1024), passes=(BACKWARD, PENALTY)),
        ),
    ),
    "leaky_relu_batch_norm": _record(
        "leaky_relu_batch_norm",
        "LeakyReLUBatchNorm",
        True,
        "Eager: nn.LeakyReLU, then nn.BatchNorm.",
        samples=((5, 6, 4, 4), (3, 5, 7)),
        representative=((8, 5, 6, 6),),
        measured=(
            Inputs((64, 256)),
            Inputs((64, 64, 8, 8)),
            Inputs((128, 128, 14, 14), layouts=LAYOUTS),
        ),
        measured_quickly=(Inputs((64, 128, 14, 14)),),
    ),
}
