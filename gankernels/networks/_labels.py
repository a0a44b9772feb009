"""Labels as additional inputs of a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def join_one_hot(x: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """Append one-hot labels `(N,)` to `x` along dimension 1, as planes where `x` is an image.

    With `num_classes == 0` the network is unconditional: `x` is returned unchanged, and labels are
    refused. Raises ValueError if labels are missing or refused.
    """
    check_labels(labels, num_classes)
    if labels is None:
        return x
    one_hot = F.one_hot(labels, num_classes).to(x.dtype)
    planes = one_hot.reshape(*one_hot.shape, *(1,) * (x.dim() - 2))
    joined = torch.cat([x, planes.expand(-1, -1, *x.shape[2:])], dim=1)
    # cat of a channels_last image and expanded planes falls back to contiguous.
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        joined = joined.contiguous(memory_format=torch.channels_last)
    return joined


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    if num_classes == 0 and labels is not None:
        raise ValueError("labels must be None for an unconditional network, got labels")
    if num_classes > 0 and labels is None:
        raise ValueError(f"labels must be given for {num_classes} classes, got None")
