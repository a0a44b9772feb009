"""The penalty on a batch of gradients, and the points at which gradients are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from gankernels.ops.checks import check_choice, check_floating, check_same_shape
from gankernels.ops.gradient_norm_penalty import KINDS, compute


def gradient_norm_penalty(grad: Tensor, kind: str = "wgan-gp", center: float = 1.0) -> Tensor:
    r"""The penalty on the norms of a batch of gradients: the reduction inside a gradient penalty.

    With the norm of each sample's gradient over all dimensions but the first,

    ==========================  ================================================
    ``wgan-gp`` and ``dragan``  :math:`\frac1N \sum_n (\lVert g_n \rVert - c)^2`
    ``wgan-lp``                 :math:`\frac1N \sum_n \max(0, \lVert g_n \rVert - c)^2`
    ``r1`` and ``r2``           :math:`\frac1N \sum_n \lVert g_n \rVert^2`
    ==========================  ================================================

    Args:
        grad: ``(N, ...)``, of float32, float64, bfloat16 or float16, with any strides.
        kind: one of the above.
        center: the target norm c; ignored by ``r1`` and ``r2``.

    Returns:
        A scalar: the mean over the batch without weight or factor 1/2, in float32 (float64 for
        float64). Where a norm is zero, the penalty's derivative is zero.

    Raises:
        TypeError: if ``grad`` is not a tensor of one of these dtypes.
        ValueError: for another kind, or a ``grad`` without a batch dimension.

    Derivatives: the first and the second, each by its own kernel; a third raises.

    References: Gulrajani et al., 2017, arXiv:1704.00028 (wgan-gp); Petzka et al., 2018,
    arXiv:1709.08894 (wgan-lp); Kodali et al., 2017, arXiv:1705.07215 (dragan); Mescheder et al.,
    2018, arXiv:1801.04406 (r1, r2).
    """
    check_floating("grad", grad)
    if grad.dim() == 0:
        raise ValueError("grad must have shape (N, ...), got a scalar")
    check_choice("kind", kind, KINDS)
    return compute(grad, KINDS[kind], center)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    r"""Points between pairs of samples: :math:`\alpha_n x_n + (1 - \alpha_n) \tilde x_n`.

    Args:
        real: ``(N, ...)``, floating-point.
        fake: of the same shape and dtype.
        alpha: ``(N,)``, one weight per sample.

    Returns:
        A tensor of ``real``'s shape and dtype.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if the shapes do not match.

    Derivatives: of any order, since this is PyTorch's own kernel (``torch.lerp``), which already
    reads each tensor once. Reference: Gulrajani et al., 2017, arXiv:1704.00028.
    """
    for name, tensor in (("real", real), ("fake", fake), ("alpha", alpha)):
        check_floating(name, tensor)
    check_same_shape("fake", fake, "real", real)
    if real.dim() == 0 or alpha.shape != real.shape[:1]:
        raise ValueError(
            f"alpha must have shape (N,), one weight for each sample of real with shape "
            f"{tuple(real.shape)}, got {tuple(alpha.shape)}"
        )
    return torch.lerp(fake, real, alpha.to(real.dtype).view(-1, *(1,) * (real.dim() - 1)))
