"""The compiled kernels as Python functions, and the shapes of their results for fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gankernels._library import LOADED


def kernel(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the kernel `name`, whose schema is in csrc/ops.

    ``fake`` takes the same arguments and returns empty tensors with the shapes, strides and dtypes
    of the kernel's results. It computes them for torch.compile and for tensors on meta.
    """
    if not LOADED:
        return _unavailable(name)

    def checked(*arguments: Any) -> Any:
        # With one tensor on meta among others, PyTorch calls the fake kernel and no other.
        devices = {a.device for a in arguments if isinstance(a, Tensor)}
        if len(devices) > 1:
            named = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(f"{name}: all tensors must be on one device, got {named}")
        return fake(*arguments)

    torch.library.register_fake(f"gankernels::{name}")(checked)
    return getattr(torch.ops.gankernels, name).default


def _unavailable(name: str) -> Callable[..., Any]:
    def raise_error(*_: object) -> None:
        raise RuntimeError(f"{name} has no compiled kernel: see gankernels.build_info()")

    return raise_error


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_like_dense(x: Tensor) -> Tensor:
    """An empty tensor with the strides of dense(x) in csrc/ops/tensor.h."""
    strides = x.stride() if _is_dense(x) else torch.empty(x.shape, device="meta").stride()
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _is_dense(x: Tensor) -> bool:
    """Whether a kernel reads x without a copy: the rule of layout_of() in csrc/ops/tensor.cpp."""
    space, channels_first, channels_last = 1, True, x.shape[1] == 1 or x.stride(1) == 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1:
            channels_first &= stride == space
            channels_last &= stride == space * x.shape[1]
        space *= size
    channels_first &= x.shape[1] == 1 or x.stride(1) == space
    batch = x.shape[0] == 1 or x.stride(0) == space * x.shape[1]
    return batch and (channels_first or channels_last)
