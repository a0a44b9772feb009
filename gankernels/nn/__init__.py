"""Layers with the conventions of torch.nn (repr, state_dict, errors)."""

from gankernels.nn.batch_norm_leaky_relu import (
    BatchNormLeakyReLU1d,
    BatchNormLeakyReLU2d,
    BatchNormLeakyReLU3d,
    LeakyReLUBatchNorm1d,
    LeakyReLUBatchNorm2d,
    LeakyReLUBatchNorm3d,
)
from gankernels.nn.minibatch_discrimination import MinibatchDiscrimination
from gankernels.nn.minibatch_stddev import MinibatchStddev

__all__ = [
    "BatchNormLeakyReLU1d",
    "BatchNormLeakyReLU2d",
    "BatchNormLeakyReLU3d",
    "LeakyReLUBatchNorm1d",
    "LeakyReLUBatchNorm2d",
    "LeakyReLUBatchNorm3d",
    "MinibatchDiscrimination",
    "MinibatchStddev",
]
