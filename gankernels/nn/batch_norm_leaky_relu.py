"""BatchNorm and LeakyReLU as one layer, in both orders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from gankernels.functional import _batch_norm


class _BatchNormActivation(_NormBase):
    """What the layers share.

    It derives from the base of torch.nn.BatchNorm for its parameters, buffers and state_dict, but
    not from torch.nn.BatchNorm's own class: code that looks for that one, such as
    ``SyncBatchNorm.convert_sync_batchnorm``, would replace the layer and lose the activation.
    """

    _activation_first: bool
    _dimensions: tuple[int, ...]
    negative_slope: float

    def __init__(
        self,
        num_features: int,
        *,
        negative_slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in self._dimensions:
            expected = " or ".join(f"{d}D" for d in self._dimensions)
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        if x.shape[1] != self.num_features:
            raise RuntimeError(
                f"expected input with {self.num_features} channels (num_features), "
                f"got {x.shape[1]} in input of shape {tuple(x.shape)}"
            )
        tracking = self.training and self.track_running_stats
        return _batch_norm(
            x,
            self.running_mean if not self.training or tracking else None,
            self.running_var if not self.training or tracking else None,
            self.num_batches_tracked if tracking else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
            self.negative_slope,
            activation_first=self._activation_first,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, negative_slope={self.negative_slope}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
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
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Everything but ``num_features`` is by keyword only.
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
