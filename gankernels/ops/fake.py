"""What the ops' fake kernels say of their results: see csrc/ops/tensor.h."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """`torch.library.register_fake` for an op of ours, which must not be given tensors of several
    devices: with one on meta among them, PyTorch would call the fake kernel and nobody else."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def checked(*arguments):
            devices = {a.device for a in arguments if isinstance(a, Tensor)}
            if len(devices) > 1:
                named = " and ".join(sorted(map(str, devices)))
                raise RuntimeError(f"{name}: all tensors must be on one device, got {named}")
            return function(*arguments)

        return torch.library.register_fake(f"gankernels::{name}")(checked)

    return register


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor) -> bool:
    """Whether the ops take x as it lies: the same rule as layout_of() in csrc/ops/tensor.cpp."""
    space, channels_first, channels_last = 1, True, x.shape[1] == 1 or x.stride(1) == 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1:
            channels_first &= stride == space
            channels_last &= stride == space * x.shape[1]
        space *= size
    channels_first &= x.shape[1] == 1 or x.stride(1) == space
    batch = x.shape[0] == 1 or x.stride(0) == space * x.shape[1]
    return batch and (channels_first or channels_last)


def empty_like_dense(x: Tensor) -> Tensor:
    """With the strides of dense(x), then empty_with_strides_of()."""
    strides = x.stride() if _is_dense(x) else torch.empty(x.shape, device="meta").stride()
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
