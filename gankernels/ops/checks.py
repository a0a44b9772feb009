"""The argument checks that the public functions and the layers share."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gankernels.ops.batch_norm_leaky_relu import Options

_HALVES = (torch.bfloat16, torch.float16)
_FLOATING = (torch.float32, torch.float64, *_HALVES)


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING:
        accepted = ", ".join(map(str, _FLOATING))
        raise TypeError(f"{name} must have one of the dtypes {accepted}, got {tensor.dtype}")


def check_same_shape(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {like}, {tuple(other.shape)}, got {tuple(tensor.shape)}"
        )


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> None:
    """Raises the error for the first argument that does not fit, as PyTorch's batch norm does."""
    check_floating("x", x)
    eps = options.eps
    dtype = x.dtype
    shape = x.shape
    channels = shape[1] if len(shape) > 1 else 0
    if len(shape) > 5:
        raise ValueError(f"x must have 2 to 5 dimensions, got shape {tuple(shape)}")
    if (running_mean is None) is not (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    # Half-precision activations may have parameters and statistics in float32, all of them.
    accepted = (dtype, torch.float32) if dtype in _HALVES else (dtype,)
    common = None
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            _explain_mismatch(x, running_mean, running_var, weight, bias, accepted)
        common = common or tensor.dtype
        if (
            tensor.dtype is not common
            or common not in accepted
            or tensor.shape != (channels,)
            or tensor.device != x.device
        ):
            _explain_mismatch(x, running_mean, running_var, weight, bias, accepted)
    if not options.training:
        if running_mean is None:
            raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
        if eps < 0:
            raise ValueError(f"eps must be non-negative, got {eps}")
    else:
        if eps <= 0:
            raise ValueError(f"eps must be positive during training, got {eps}")
        if options.group is None and channels and x.numel() == channels:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {tuple(shape)}"
            )


def _explain_mismatch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    accepted: tuple[torch.dtype, ...],
) -> None:
    """Raises the error for the first per-channel tensor that does not match ``x``."""
    channels = x.shape[1] if x.dim() > 1 else 0
    first = None
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(tensor).__name__}")
        if tensor.shape != (channels,):
            raise RuntimeError(
                f"{name} must have shape ({channels},), one element for each channel of x, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in accepted:
            raise RuntimeError(
                f"{name} must have dtype {' or '.join(map(str, accepted))} for an x of {x.dtype}, "
                f"got {tensor.dtype}"
            )
        first = first or (name, tensor)
        if tensor.dtype is not first[1].dtype:
            raise RuntimeError(
                f"{name} must have the dtype of {first[0]}, {first[1].dtype}, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise RuntimeError(f"{name} must be on {x.device} like x, got {tensor.device}")
