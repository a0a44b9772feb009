"""Minibatch discrimination as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.ops.checks import check_floating
from gankernels.ops.minibatch_discrimination import compute, reference


def minibatch_discrimination(m: Tensor) -> Tensor:
    r"""The similarity of every sample to the others of its batch, by several kernels.

    .. math:: o_{n,b} = \sum_{j \ne n} \exp\Bigl(-\sum_c |m_{n,b,c} - m_{j,b,c}|\Bigr)

    Neither the function nor its derivatives store N x N elements: the workspace is at most twice
    the bytes of ``m`` plus some blocks that stay in the caches (or, if B is so small that it fits
    in one vector, two copies of ``m`` in the accumulation type for the first derivative and three
    for the second). Only ``m`` is saved for backward.

    Args:
        m: ``(N, B, C)``, samples by kernels by dimensions of a kernel, of float32, float64,
            bfloat16 or float16, with any strides.

    Returns:
        ``(N, B)``, in ``m``'s dtype. Zero for a batch of one.

    Raises:
        TypeError: if ``m`` is not a tensor of one of these dtypes.
        ValueError: if ``m`` does not have three dimensions.

    Derivatives: the first and the second, each by its own kernel; a third raises. The derivative
    of ``|x|`` at zero is zero, so identical samples (mode collapse) have finite gradients; its
    second derivative is zero, so that of the op acts through exp alone.
    Half-precision inputs are compared and summed in float32, under autocast too. Similarities below
    the smallest normal number of the accumulation type (distances above 87.3 in float32) count as
    zero.

    Reference: Salimans et al., 2016, arXiv:1606.03498, section 3.2.
    """
    if not torch.jit.is_scripting():
        check_floating("m", m)
        if m.dim() != 3:
            raise ValueError(f"m must have shape (N, B, C), got {tuple(m.shape)}")
        return compute(m)
    return reference(m)
