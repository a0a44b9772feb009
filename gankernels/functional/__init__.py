"""The ops as functions of tensors, with their arguments checked."""

from gankernels.functional.batch_norm_leaky_relu import batch_norm_leaky_relu, leaky_relu_batch_norm
from gankernels.functional.gradient_norm_penalty import gradient_norm_penalty, interpolate
from gankernels.functional.gradient_penalty import gradient_penalty
from gankernels.functional.minibatch_discrimination import minibatch_discrimination
from gankernels.functional.minibatch_stddev import minibatch_stddev

__all__ = [
    "batch_norm_leaky_relu",
    "gradient_norm_penalty",
    "gradient_penalty",
    "interpolate",
    "leaky_relu_batch_norm",
    "minibatch_discrimination",
    "minibatch_stddev",
]
