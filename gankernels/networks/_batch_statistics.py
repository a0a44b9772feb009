"""Discriminators that see more than one sample at a time."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

from gankernels.nn import MinibatchDiscrimination, MinibatchStddev
from gankernels.nn.cpu import OneDNNLinear


def with_batch_statistics(
    discriminator: nn.Module, stddev: bool = False, kernels: tuple[int, int] | None = None
) -> nn.Module:
    """Adds statistics of the batch to the features that the discriminator's last layer sees.

    Replaces `discriminator.head`, a linear layer or a convolution as large as its input, and
    returns the discriminator. The new head starts with the old one's weights.

    Args:
        discriminator: computes `head(features(x))`.
        stddev: whether to join minibatch standard deviation (Karras et al. 2018, arXiv:1710.10196).
        kernels: number and dimension of the kernels of minibatch discrimination (Salimans et al.
            2016, arXiv:1606.03498), or None for none.

    Raises:
        ValueError: if statistics are requested and the discriminator has no such head.
    """
    if not stddev and kernels is None:
        return discriminator
    old = getattr(discriminator, "head", None)
    if not isinstance(old, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"{type(discriminator).__name__} has no linear or convolutional head that could see "
            "statistics of the batch: leave out minibatch_stddev and minibatch_discrimination"
        )
    width = features = prod(old.weight.shape[1:])
    layers: list[nn.Module] = [nn.Flatten()]
    if stddev:
        layers.append(MinibatchStddev())
        width += 1
    if kernels is not None:
        layers.append(MinibatchDiscrimination(width, *kernels))
        width += kernels[0]
    last = OneDNNLinear(width, old.weight.shape[0], bias=old.bias is not None)
    with torch.no_grad():
        last.weight[:, :features] = old.weight.flatten(1)
        if old.bias is not None:
            last.bias.copy_(old.bias)
    discriminator.head = nn.Sequential(*layers, last)
    setattr(discriminator, "per_sample", False)  # noqa: B010  (a class attribute before)
    return discriminator
