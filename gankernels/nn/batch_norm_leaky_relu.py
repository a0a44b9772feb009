"""BatchNorm and LeakyReLU as one layer, in both orders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.modules.batchnorm import _NormBase

from gankernels.functional import _batch_norm
from gankernels.ops.batch_norm_leaky_relu import reference
from gankernels.ops.collectives import check_group, group_of_several


class _BatchNormActivation(_NormBase):
    """What the layers share.

    It derives from the base of torch.nn.BatchNorm for its parameters, buffers and state_dict, but
    not from torch.nn.BatchNorm's own class: code that looks for that one, such as
    ``SyncBatchNorm.convert_sync_batchnorm``, would replace the layer and lose the activation.
    """

    _activation_first: bool
    _dimensions: tuple[int, ...]
    negative_slope: float
    sync: bool = False  # for the layers that gankernels.fuse makes, which have no attribute
    process_group: dist.ProcessGroup | None = None

    # For torch.jit.script.
    __constants__ = (
        *_NormBase.__constants__, "negative_slope", "sync", "_activation_first", "_dimensions",
    )  # fmt: skip
    __jit_ignored_attributes__ = ("process_group", "_before_fusion")

    def __init__(
        self,
        num_features: int,
        *,
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not isinstance(sync, bool):
            raise TypeError(f"sync is a {type(sync).__name__}; a bool is needed")
        check_group(process_group)
        self.negative_slope = negative_slope
        self.sync = sync
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self._dimensions:
            expected = " or ".join([f"{d}D" for d in self._dimensions])
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        training = self.training or self.running_mean is None
        tracking = self.training and self.track_running_stats
        running_mean = self.running_mean if not self.training or tracking else None
        running_var = self.running_var if not self.training or tracking else None
        if not torch.jit.is_scripting():
            if x.shape[1] != self.num_features:
                raise RuntimeError(
                    f"expected input with {self.num_features} channels (num_features), "
                    f"got {x.shape[1]} in input of shape {tuple(x.shape)}"
                )
            return _batch_norm(
                x,
                running_mean,
                running_var,
                self.num_batches_tracked if tracking else None,
                self.weight,
                self.bias,
                training,
                # As in PyTorch: without a counter there is nothing to average over.
                self.momentum if self.num_batches_tracked is not None else self.momentum or 0.0,
                self.eps,
                self.negative_slope,
                activation_first=self._activation_first,
                group=group_of_several(self.process_group) if self.sync and self.training else None,
            )
        # Scripted code is to run where there is no gankernels, as all that is exported.
        if self.sync and self.training:
            raise RuntimeError("a scripted layer cannot train with sync=True")
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return reference(
            x,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            float(self.negative_slope),
            self._activation_first,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, negative_slope={self.negative_slope}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
            f"{', sync=True' if self.sync else ''}"
        )


_DOC = """{title} over a {shapes} input, as one layer.

    The same as ``{sequence}``, in fewer passes over memory, and differentiable twice by kernels of
    its own. The keys of its state_dict are those of :class:`torch.nn.BatchNorm{d}d`, so checkpoints
    go both ways. Details, errors and references: :func:`gankernels.functional.{function}`.

    Args:
        num_features: the number of channels C.
        negative_slope: LeakyReLU's slope for negative values; 0 is ReLU, 1 a lone BatchNorm.
        eps: added to the variance.
        momentum: the share of a batch in the running statistics; None for a cumulative average.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        sync: whether the batch, in training, is that of all processes of ``process_group``; may
            also be set later, as an attribute. See below.
        process_group: of ``torch.distributed``; None for all processes.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Everything but ``num_features`` is by keyword only.

    With ``sync=True`` mean, variance and both derivatives are those of the batches of all processes
    together, as with :class:`torch.nn.SyncBatchNorm`, but on CPUs too and twice differentiable. As
    there, gradients are those of the sum of all processes' losses; those of weight and bias are of
    this process' part of it, for DistributedDataParallel or the like to add up. Batches may be of
    different sizes, or empty. All processes run forward and backward alike, since they wait for
    each other: one ``all_gather`` forward, one ``all_reduce`` backward and one in the second
    derivative. In evaluation, without a process group or with one process nothing is exchanged.
    """


def _layer(order: str, d: int) -> type[_BatchNormActivation]:
    activation_first = order == "LeakyReLUBatchNorm"
    parts = [f"BatchNorm{d}d(C)", "LeakyReLU(negative_slope)"]
    titles = ["Batch normalisation", "LeakyReLU"]
    if activation_first:
        parts.reverse()
        titles.reverse()
    doc = _DOC.format(
        title=f"{titles[0]} then {titles[1]}",
        shapes={1: "(N, C) or (N, C, L)", 2: "(N, C, H, W)", 3: "(N, C, D, H, W)"}[d],
        sequence=f"Sequential({', '.join(parts)})",
        function="leaky_relu_batch_norm" if activation_first else "batch_norm_leaky_relu",
        d=d,
    )
    return type(
        f"{order}{d}d",
        (_BatchNormActivation,),
        {
            "__doc__": doc,
            "__module__": __name__,
            "_activation_first": activation_first,
            "_dimensions": {1: (2, 3), 2: (4,), 3: (5,)}[d],
        },
    )


BatchNormLeakyReLU1d = _layer("BatchNormLeakyReLU", 1)
BatchNormLeakyReLU2d = _layer("BatchNormLeakyReLU", 2)
BatchNormLeakyReLU3d = _layer("BatchNormLeakyReLU", 3)
LeakyReLUBatchNorm1d = _layer("LeakyReLUBatchNorm", 1)
LeakyReLUBatchNorm2d = _layer("LeakyReLUBatchNorm", 2)
LeakyReLUBatchNorm3d = _layer("LeakyReLUBatchNorm", 3)


class SyncBatchNormLeakyReLU(_BatchNormActivation):
    """What :func:`gankernels.fuse` makes of a SyncBatchNorm, which is of any dimension too."""

    _activation_first = False
    _dimensions = (2, 3, 4, 5)
    sync = True


class LeakyReLUSyncBatchNorm(SyncBatchNormLeakyReLU):
    """The same for LeakyReLU then SyncBatchNorm."""

    _activation_first = True
