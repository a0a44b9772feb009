"""The ops as functions of tensors, with their arguments checked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from gankernels._library import has_kernel
from gankernels.ops import batch_norm_leaky_relu as _bn
from gankernels.ops import gradient_norm_penalty as _gnp
from gankernels.ops import minibatch_discrimination as _mbd
from gankernels.ops import minibatch_stddev as _stddev
from gankernels.ops import sync_batch_norm_leaky_relu as _sync_bn

__all__ = [
    "batch_norm_leaky_relu",
    "gradient_norm_penalty",
    "gradient_penalty",
    "interpolate",
    "leaky_relu_batch_norm",
    "minibatch_discrimination",
    "minibatch_stddev",
]

_HALVES = (torch.bfloat16, torch.float16)
_FLOATING = (torch.float32, torch.float64, *_HALVES)


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
    r"""Batch normalisation followed by LeakyReLU, fused: the order of DCGAN.

    .. math:: y = \mathrm{lrelu}\Bigl(w_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c\Bigr)

    Computes ``F.leaky_relu(F.batch_norm(x, ...), negative_slope)`` with fewer passes over memory,
    and saves for backward only ``x`` and per-channel statistics.

    Args:
        x: ``(N, C)`` to ``(N, C, d1, d2, d3)``, of float32, float64, bfloat16 or float16. Dense
            contiguous and channels_last tensors are used as they lie, others are copied first.
        running_mean: ``(C,)`` or None; updated in place in training.
        running_var: ``(C,)`` or None; updated in place in training, with the unbiased variance.
        weight: ``(C,)`` or None, in ``x``'s dtype, or float32 where ``x`` is of half precision.
        bias: likewise.
        training: whether to normalise by the statistics of the batch or by the running ones.
        momentum: the share of the batch in the running statistics.
        eps: added to the variance.
        negative_slope: LeakyReLU's slope for negative values; 0 is ReLU, 1 leaves batch
            normalisation alone.

    Returns:
        A tensor of ``x``'s shape, dtype and memory layout.

    Raises:
        TypeError: where ``x`` is no floating-point tensor of these dtypes.
        ValueError: in training with one value per channel or with ``eps <= 0``, with a negative
            ``eps`` in evaluation, or where only one of the running statistics is given.
        RuntimeError: where a per-channel argument does not match ``x``.

    Derivatives: the first and the second, both with kernels of their own, with respect to ``x``,
    ``weight`` and ``bias``; asking for a third raises. Under autocast the op computes in ``x``'s
    dtype, with sums and statistics in float32.

    References: Ioffe & Szegedy, 2015, arXiv:1502.03167; Radford et al., 2016, arXiv:1511.06434.
    """
    return _batch_norm(
        x, running_mean, running_var, None, weight, bias, training, momentum, eps, negative_slope,
        activation_first=False,
    )  # fmt: skip


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
    r"""LeakyReLU followed by batch normalisation, fused: the order of the classic Keras cGAN.

    .. math:: y = w_c \frac{\mathrm{lrelu}(x) - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c

    with the statistics of ``lrelu(x)``. Computes ``F.batch_norm(F.leaky_relu(x, negative_slope),
    ...)``; arguments, result, errors and derivatives are those of :func:`batch_norm_leaky_relu`.
    """
    return _batch_norm(
        x, running_mean, running_var, None, weight, bias, training, momentum, eps, negative_slope,
        activation_first=True,
    )  # fmt: skip


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    negative_slope: float,
    *,
    activation_first: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Both orders. ``num_batches_tracked`` is counted up in training; with ``momentum=None`` it
    makes the running statistics a cumulative average, without the host waiting for the device.
    With a group, which there is in training only, the batch is that of all its processes."""
    _check(x, running_mean, running_var, weight, bias, training, eps, alone=group is None)
    averaging = training and running_mean is not None
    if momentum is None and averaging and num_batches_tracked is None:
        raise TypeError("momentum is None; a float is needed")
    if group is not None:
        op = _sync_bn.batch_norm_leaky_relu
        if not has_kernel(x, "batch_norm_leaky_relu"):
            op = _sync_bn.reference
        y, statistics, count = op(x, weight, bias, eps, negative_slope, activation_first, group)
        if averaging:
            _sync_bn.update_running_statistics(
                running_mean, running_var, num_batches_tracked, statistics, momentum, count
            )
        return y
    # Which empty batches are accepted, and what becomes of them, is PyTorch's to decide.
    if x.dim() < 2 or x.numel() == 0 or not has_kernel(x, "batch_norm_leaky_relu"):
        if averaging and num_batches_tracked is not None:
            momentum = _bn.count_up(num_batches_tracked, momentum)
        if momentum is None:
            momentum = 0.0
        return _bn.reference(
            x, running_mean, running_var, weight, bias, training, momentum, eps, negative_slope,
            activation_first,
        )  # fmt: skip
    if training:
        y, statistics = _bn.batch_norm_leaky_relu(
            x, weight, bias, None, eps, negative_slope, activation_first
        )
        if averaging:
            _bn.update_running_statistics(
                running_mean, running_var, num_batches_tracked, statistics, momentum, _bn.count(x)
            )
        return y
    statistics = torch.stack((running_mean, running_var))
    if statistics.dtype is not torch.float64 and statistics.dtype is not torch.float32:
        statistics = statistics.float()
    return _bn.batch_norm_leaky_relu(
        x, weight, bias, statistics, eps, negative_slope, activation_first
    )[0]


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    alone: bool,
) -> None:
    _check_floating("x", x)
    dtype = x.dtype
    shape = x.shape
    channels = shape[1] if len(shape) > 1 else 0
    if len(shape) > 5:
        raise ValueError(f"x has {len(shape)} dimensions; accepted are 2 to 5")
    if (running_mean is None) is not (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    # Half-precision activations may go with parameters and statistics in float32, all of them.
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
    if not training:
        if running_mean is None:
            raise RuntimeError("running_mean and running_var must be defined in evaluation mode")
        if eps < 0:
            raise ValueError(f"eps must be non-negative, but got {eps}")
    else:
        if eps <= 0:
            raise ValueError(f"eps must be positive during training, but got {eps}")
        if alone and channels and x.numel() == channels:
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
    """Raises the error for the first per-channel tensor that does not go with ``x``."""
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
            raise TypeError(f"{name} must be a Tensor or None, got a {type(tensor).__name__}")
        if tensor.shape != (channels,):
            raise RuntimeError(
                f"{name} should contain {channels} elements, one for each channel of x, "
                f"but has shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in accepted:
            raise RuntimeError(
                f"{name} has dtype {tensor.dtype}, but x has {x.dtype}: accepted are "
                f"{' or '.join(map(str, accepted))}"
            )
        first = first or (name, tensor)
        if tensor.dtype is not first[1].dtype:
            raise RuntimeError(
                f"{name} has dtype {tensor.dtype}, but {first[0]} has {first[1].dtype}: "
                "all per-channel tensors share one dtype"
            )
        if tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, but x is on {x.device}")


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
        center: the norm c that is asked for; of no meaning to ``r1`` and ``r2``.

    Returns:
        A scalar: the mean over the batch without weight or factor 1/2, in float32 (float64 for
        float64). Where a norm is zero the penalty's derivative is zero.

    Raises:
        TypeError: where ``grad`` is no floating-point tensor of these dtypes.
        ValueError: for another kind, or a ``grad`` without a batch dimension.

    Derivatives: the first and the second, each with a kernel of its own; a third raises.

    References: Gulrajani et al., 2017, arXiv:1704.00028 (wgan-gp); Petzka et al., 2018,
    arXiv:1709.08894 (wgan-lp); Kodali et al., 2017, arXiv:1705.07215 (dragan); Mescheder et al.,
    2018, arXiv:1801.04406 (r1, r2).
    """
    _check_floating("grad", grad)
    if grad.dim() == 0:
        raise ValueError("grad is a scalar; a batch (N, ...) is needed")
    if kind not in _gnp.KINDS:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(map(repr, _gnp.KINDS))}")
    if not has_kernel(grad, "gradient_norm_penalty"):
        return _gnp.reference(grad, _gnp.KINDS[kind], center)
    return _gnp.gradient_norm_penalty(grad, _gnp.KINDS[kind], center)[0]


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    r"""Points between pairs of samples: :math:`\alpha_n x_n + (1 - \alpha_n) \tilde x_n`.

    Args:
        real: ``(N, ...)``, floating-point.
        fake: of the same shape and dtype.
        alpha: ``(N,)``, one weight per sample.

    Returns:
        A tensor of ``real``'s shape and dtype.

    Raises:
        TypeError: where an argument is no floating-point tensor.
        ValueError: where the shapes do not fit.

    Derivatives: of any order, since this is one of PyTorch's own kernels (``torch.lerp``), which
    already reads each tensor once. Reference: Gulrajani et al., 2017, arXiv:1704.00028.
    """
    for name, tensor in (("real", real), ("fake", fake), ("alpha", alpha)):
        _check_floating(name, tensor)
    if fake.shape != real.shape:
        raise ValueError(
            f"fake has shape {tuple(fake.shape)}, but real has {tuple(real.shape)}: "
            "they must be the same"
        )
    if real.dim() == 0 or alpha.shape != real.shape[:1]:
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)}; one weight per sample of real, which has shape "
            f"{tuple(real.shape)}, is needed"
        )
    return torch.lerp(fake, real, alpha.to(real.dtype).view(-1, *(1,) * (real.dim() - 1)))


def minibatch_discrimination(m: Tensor) -> Tensor:
    r"""How close every sample is to the others of its batch, seen by several kernels.

    .. math:: o_{n,b} = \sum_{j \ne n} \exp\Bigl(-\sum_c |m_{n,b,c} - m_{j,b,c}|\Bigr)

    Neither this nor its derivatives hold anything of N x N elements: the workspace is at most twice
    the bytes of ``m`` plus some blocks that stay in the caches (or, where B is so small that it
    fills a vector only once, two copies of ``m`` in the accumulation type for the first derivative
    and three for the second). Saved for backward is ``m`` alone.

    Args:
        m: ``(N, B, C)``, samples by kernels by dimensions of a kernel, of float32, float64,
            bfloat16 or float16, with any strides.

    Returns:
        ``(N, B)``, in ``m``'s dtype. Zero for a batch of one.

    Raises:
        TypeError: where ``m`` is no floating-point tensor of these dtypes.
        ValueError: where ``m`` has not three dimensions.

    Derivatives: the first and the second, each with a kernel of its own; a third raises. The
    derivative of ``|x|`` at zero is zero, so samples that are the same (mode collapse) have finite
    gradients; its second derivative is zero, so the second derivative acts through exp alone.
    Half-precision inputs are compared and summed in float32, under autocast too. Similarities below
    the smallest normal number of the accumulation type (distances above 87.3 in float32) count as
    zero.

    Reference: Salimans et al., 2016, arXiv:1606.03498, section 3.2.
    """
    if not torch.jit.is_scripting():
        _check_floating("m", m)
        if m.dim() != 3:
            raise ValueError(f"m has shape {tuple(m.shape)}; three dimensions (N, B, C) are needed")
        if has_kernel(m, "minibatch_discrimination"):
            return _mbd.minibatch_discrimination(m)
    return _mbd.reference(m)


def minibatch_stddev(x: Tensor, group_size: int = 4, num_channels: int = 1) -> Tensor:
    """The feature maps of :class:`gankernels.nn.MinibatchStddev`, which says how they are computed.

    Args:
        x: ``(N, C)`` or ``(N, C, ...)``, of float32, float64, bfloat16 or float16. Dense contiguous
            and channels_last tensors are used as they lie, others are copied first.
        group_size: samples per group, at most.
        num_channels: the number of maps; C must be divisible by it.

    Returns:
        ``(N, num_channels)`` or ``(N, num_channels, ...)``, in ``x``'s dtype, constant over space
        (an expanded tensor).

    Raises:
        TypeError: where ``x`` is no floating-point tensor of these dtypes.
        ValueError: where ``x`` has no channels to divide by ``num_channels``, or where a number is
            below one.

    Derivatives: the first and the second, each with a kernel of its own; a third raises. With 1e-8
    added to the variance both are finite where all members of a group agree. Half-precision inputs
    are computed with in float32, under autocast too.

    Reference: Karras et al., 2018, arXiv:1710.10196, section 3.
    """
    if not torch.jit.is_scripting():
        _check_floating("x", x)
        if x.dim() < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; at least two dimensions are needed")
        for name, value in (("group_size", group_size), ("num_channels", num_channels)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if x.shape[1] == 0 or x.shape[1] % num_channels:
            raise ValueError(
                f"x has {x.shape[1]} channels, which num_channels={num_channels} does not divide"
            )
        if x.numel() and has_kernel(x, "minibatch_stddev"):
            return _stddev.fused(x, group_size, num_channels)
    return _stddev.reference(x, group_size, num_channels)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; a Tensor is needed")
    if tensor.dtype not in _FLOATING:
        accepted = ", ".join(map(str, _FLOATING))
        raise TypeError(f"{name} has dtype {tensor.dtype}; accepted are {accepted}")


from gankernels.penalty import gradient_penalty  # noqa: E402  (it is built on the ops above)
