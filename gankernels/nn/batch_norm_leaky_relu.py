"""BatchNorm and LeakyReLU as one layer, in both orders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from gankernels.nn._rewrite import Half, call_in_trace
from gankernels.nn.pairs import Eps, slope_of
from gankernels.ops.batch_norm_dispatch import compute
from gankernels.ops.batch_norm_leaky_relu import Options, reference
from gankernels.ops.collectives import check_group, group_of_several


class _BatchNormActivation(Half, _BatchNorm):
    """The base class of the layers.

    They are BatchNorms for code that freezes, initializes or recomputes the statistics of such.
    Code that computes the norm in another way would lose the activation. Such code reads ``eps``,
    which therefore reverts the layer or raises (see ``pairs.Eps``).
    """

    _activation_first: bool
    negative_slope: float
    sync: bool = False  # the default of layers that gankernels.fuse makes
    process_group: dist.ProcessGroup | None = None

    # For torch.jit.script.
    __constants__ = [  # noqa: RUF012  (a list in PyTorch)
        *_BatchNorm.__constants__, "negative_slope", "sync", "_activation_first",
    ]  # fmt: skip
    __jit_ignored_attributes__ = ("process_group", "_before_fusion")
    __jit_unused_properties__ = ("eps",)

    def __init__(
        self,
        num_features: int,
        *,
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        bias: bool = True,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = {} if bias else {"bias": False}  # not every PyTorch has this argument
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **given
        )
        if not isinstance(sync, bool):
            raise TypeError(f"sync must be a bool, got {type(sync).__name__}")
        check_group(process_group)
        self.negative_slope = negative_slope
        self.sync = sync
        self.process_group = process_group

    def _reverting(self, group: list[nn.Module]) -> Callable[[], None]:
        slope_of(group)

        def finish() -> None:
            del self.negative_slope
            vars(self).pop("sync", None)  # it may have been set meanwhile

        return finish

    @property
    def eps(self) -> float:
        return Eps(self.__dict__["eps"], self)

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = float.__float__(value) if isinstance(value, Eps) else value

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript needs this condition alone)
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
        self._check_input_dim(input)
        training = self.training or self.running_mean is None
        tracking = self.training and self.track_running_stats
        running_mean = self.running_mean if not self.training or tracking else None
        running_var = self.running_var if not self.training or tracking else None
        if not torch.jit.is_scripting():
            if tracking and running_mean is None and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            # Tensors per channel, if any, decide the number, as in PyTorch's layer.
            if input.shape[1] != self.num_features and self.weight is running_mean is None:
                raise RuntimeError(
                    f"expected input with {self.num_features} channels (num_features), "
                    f"got {input.shape[1]} in input of shape {tuple(input.shape)}"
                )
            options = Options(
                training,
                # As in PyTorch: without a counter there is nothing to average over.
                self.momentum if self.num_batches_tracked is not None else self.momentum or 0.0,
                self.__dict__["eps"],
                self.negative_slope,
                self._activation_first,
                group_of_several(self.process_group) if self.sync and self.training else None,
            )
            counter = self.num_batches_tracked if tracking else None
            return compute(
                input, running_mean, running_var, counter, self.weight, self.bias, options
            )
        # Scripted code must run without gankernels installed, like all exported code.
        if self.sync and self.training:
            raise RuntimeError("a scripted layer cannot train with sync=True")
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return reference(
            input,
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
            f"{self.num_features}, negative_slope={self.negative_slope}, "
            f"eps={self.__dict__['eps']}, momentum={self.momentum}, affine={self.affine}, "
            f"{'bias=False, ' if self.affine and self.bias is None else ''}"
            f"track_running_stats={self.track_running_stats}"
            f"{', sync=True' if self.sync else ''}"
        )


_DOC = """{title} over a {shapes} input, as one layer.

    It computes the same as ``{sequence}`` in fewer passes over memory, with kernels for the first
    and second derivative. Its state_dict keys match :class:`torch.nn.BatchNorm{d}d`, so checkpoints
    load in both directions. Details, errors and references:
    :func:`gankernels.functional.{function}`.

    Args:
        num_features: the number of channels C.
        negative_slope: LeakyReLU's slope for negative values; 0 is ReLU, 1 is BatchNorm only.
        eps: added to the variance.
        momentum: the share of a batch in the running statistics; None for a cumulative average.
        affine: whether there are a weight and a bias per channel.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        bias: whether there is a bias besides the weight.
        sync: whether the batch, in training, is that of all processes of ``process_group``; may
            also be set later, as an attribute. See below.
        process_group: a group of ``torch.distributed``; None for all processes.
        device: the device of parameters and buffers.
        dtype: the dtype of parameters and buffers.

    All arguments but ``num_features`` are keyword-only.

    With ``sync=True`` mean, variance and both derivatives are those of the batches of all processes
    together, as with :class:`torch.nn.SyncBatchNorm`, but on CPUs too and twice differentiable. As
    there, gradients are those of the sum of all processes' losses; the gradients of weight and bias
    are this process' part, to be summed by DistributedDataParallel or the like. Batches may be of
    different sizes, or empty. All processes must run the same passes, since they wait for each
    other: one ``all_gather`` forward, one ``all_reduce`` backward and one in the second derivative.
    In evaluation, without a process group or with one process nothing is exchanged.
    """


def _layer(order: str, d: int) -> type[_BatchNormActivation]:
    activation_first = order == "LeakyReLUBatchNorm"
    parts = [f"BatchNorm{d}d(C)", "LeakyReLU(negative_slope)"]
    titles = ["Batch normalization", "LeakyReLU"]
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
        (_BatchNormActivation, {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[d]),
        {
            "__doc__": doc,
            "__module__": __name__,
            "_activation_first": activation_first,
        },
    )


BatchNormLeakyReLU1d = _layer("BatchNormLeakyReLU", 1)
BatchNormLeakyReLU2d = _layer("BatchNormLeakyReLU", 2)
BatchNormLeakyReLU3d = _layer("BatchNormLeakyReLU", 3)
LeakyReLUBatchNorm1d = _layer("LeakyReLUBatchNorm", 1)
LeakyReLUBatchNorm2d = _layer("LeakyReLUBatchNorm", 2)
LeakyReLUBatchNorm3d = _layer("LeakyReLUBatchNorm", 3)


class SyncBatchNormLeakyReLU(_BatchNormActivation):
    """The layer of :func:`gankernels.fuse` for SyncBatchNorm: it also accepts any dimension."""

    _activation_first = False
    sync = True

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


class LeakyReLUSyncBatchNorm(SyncBatchNormLeakyReLU):
    """The same for LeakyReLU then SyncBatchNorm."""

    _activation_first = True
