"""Minibatch discrimination as a layer of a discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import Proxy

from gankernels.functional import minibatch_discrimination
from gankernels.nn._rewrite import call_in_trace
from gankernels.ops.collectives import (
    check_group,
    group_of_several,
    own_rows,
    row_counts,
    rows_of_all,
)


class MinibatchDiscrimination(nn.Module):
    r"""Lets a discriminator see how close a sample is to the others of its batch.

    Each sample's features :math:`x_n` are multiplied with a tensor, :math:`M_n = x_n W` of shape
    ``(num_kernels, kernel_dim)``, and

    .. math:: o_{n,b} = \sum_{j \ne n} \exp\Bigl(-\sum_c |M_{n,b,c} - M_{j,b,c}|\Bigr)

    is appended to them. A generator that collapses to few modes is recognized by large :math:`o`.
    As in the authors' own code (improved-gan), a sample is not compared with itself.

    That code also scales every column of W to unit norm times a learned factor, initialized from a
    batch, and adds a bias to :math:`o`. Here W is a plain parameter, drawn from a normal
    distribution with mean 0 and variance ``1 / in_features``, so that its columns start with a norm
    of about 1; the layer that follows has the bias.

    Args:
        in_features: size of a sample's features.
        num_kernels: count of appended features (B in the paper; improved-gan: 100 for MNIST).
        kernel_dim: dimensions in which a kernel compares samples (C in the paper; 5).
        sync: whether samples are compared, in training, with those of all processes of
            ``process_group``; may also be set later, as an attribute. See below.
        process_group: a group of ``torch.distributed``; None for all processes.
        device: the device of the parameter.
        dtype: the dtype of the parameter.

    Shape:
        - Input: ``(N, in_features)``
        - Output: ``(N, in_features + num_kernels)``

    Attributes:
        weight: ``(in_features, num_kernels, kernel_dim)``, W above.

    All samples of a batch are compared: real and generated ones should be in separate batches, and
    results depend on the batch size. Under autocast the product is computed in half precision, the
    sums over distances in float32. Differentiable twice; details and errors:
    :func:`gankernels.functional.minibatch_discrimination`.

    With ``sync=True`` the output and both derivatives are those of the batches of all processes
    together: gradients are those of the sum of all processes' losses, the weight's gradient is this
    process' part, as in ``gankernels.nn.BatchNormLeakyReLU2d(sync=True)``. Batches may be of
    different sizes. All processes must run the same passes, since they wait for each other: one
    ``all_gather`` of :math:`M` forward, one of the gradient of :math:`o` backward and one of the
    size of :math:`M` in the second derivative. Every process computes the similarities of all
    samples. In evaluation, without a process group or with one process nothing is exchanged.

    Reference: Salimans et al., 2016, arXiv:1606.03498, section 3.2.
    """

    __jit_ignored_attributes__ = ("process_group",)

    def __init__(
        self,
        in_features: int,
        num_kernels: int,
        kernel_dim: int,
        *,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("num_kernels", num_kernels),
            ("kernel_dim", kernel_dim),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(sync, bool):
            raise TypeError(f"sync must be a bool, got {type(sync).__name__}")
        check_group(process_group)
        self.in_features = in_features
        self.num_kernels = num_kernels
        self.kernel_dim = kernel_dim
        self.sync = sync
        self.process_group = process_group
        self.weight = nn.Parameter(
            torch.empty(in_features, num_kernels, kernel_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript needs this condition alone)
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
        if input.dim() != 2:
            raise ValueError(f"expected 2D input (got {input.dim()}D input)")
        if input.shape[1] != self.in_features:
            raise RuntimeError(
                f"expected input with {self.in_features} features (in_features), "
                f"got {input.shape[1]} in input of shape {(input.shape[0], input.shape[1])}"
            )
        m = (input @ self.weight.flatten(1)).unflatten(1, (self.num_kernels, self.kernel_dim))
        if not torch.jit.is_scripting():
            group = group_of_several(self.process_group) if self.sync and self.training else None
            if group is not None:
                counts = row_counts(m, group)
                o = minibatch_discrimination(rows_of_all(m, counts, group))
                return torch.cat((input, own_rows(o, counts, group)), 1)
        elif self.sync and self.training:
            raise RuntimeError("a scripted layer cannot train with sync=True")
        return torch.cat((input, minibatch_discrimination(m)), 1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, num_kernels={self.num_kernels}, kernel_dim={self.kernel_dim}"
            f"{', sync=True' if self.sync else ''}"
        )
