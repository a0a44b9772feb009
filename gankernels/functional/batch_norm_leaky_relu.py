"""Batch normalization and LeakyReLU as one function, in both orders."""

from __future__ import annotations

from torch import Tensor

from gankernels.ops.batch_norm_dispatch import compute
from gankernels.ops.batch_norm_leaky_relu import Options


def batch_norm_leaky_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> Tensor:
    r"""Batch normalization followed by LeakyReLU, fused: the order of DCGAN.

    .. math:: y = \mathrm{lrelu}\Bigl(w_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c\Bigr)

    Computes ``F.leaky_relu(F.batch_norm(x, ...), negative_slope)`` with fewer passes over memory,
    and saves for backward only ``x`` and per-channel statistics.

    Args:
        x: ``(N, C)`` to ``(N, C, d1, d2, d3)``, of float32, float64, bfloat16 or float16. Dense
            contiguous and channels_last tensors are read directly, others are copied first.
        running_mean: ``(C,)`` or None; updated in place in training.
        running_var: ``(C,)`` or None; updated in place in training, with the unbiased variance.
        weight: ``(C,)`` or None, in ``x``'s dtype, or in float32 if ``x`` is in half precision.
        bias: as for ``weight``.
        training: whether to normalize by the statistics of the batch or by the running ones.
        momentum: the share of the batch in the running statistics.
        eps: added to the variance.
        negative_slope: LeakyReLU's slope for negative values; 0 is ReLU, 1 is batch normalization
            only.

    Returns:
        A tensor of ``x``'s shape, dtype and memory layout.

    Raises:
        TypeError: if ``x`` is not a tensor of one of these dtypes.
        ValueError: in training with one value per channel or with ``eps <= 0``, with a negative
            ``eps`` in evaluation, or with only one of the running statistics.
        RuntimeError: if a per-channel argument does not match ``x``.

    Derivatives: the first and the second, each by its own kernel, with respect to ``x``,
    ``weight`` and ``bias``; asking for a third raises. Under autocast the op computes in ``x``'s
    dtype, with sums and statistics in float32.

    References: Ioffe & Szegedy, 2015, arXiv:1502.03167; Radford et al., 2016, arXiv:1511.06434.
    """
    options = Options(training, momentum, eps, negative_slope, activation_first=False)
    return compute(x, running_mean, running_var, None, weight, bias, options)


def leaky_relu_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
) -> Tensor:
    r"""LeakyReLU followed by batch normalization, fused: the order of the classic Keras cGAN.

    .. math:: y = w_c \frac{\mathrm{lrelu}(x) - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c

    with the statistics of ``lrelu(x)``. Computes ``F.batch_norm(F.leaky_relu(x, negative_slope),
    ...)``; arguments, result, errors and derivatives are those of :func:`batch_norm_leaky_relu`.
    """
    options = Options(training, momentum, eps, negative_slope, activation_first=True)
    return compute(x, running_mean, running_var, None, weight, bias, options)
