"""How an op gets its derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Function


def differentiable(
    name: str, compute: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """Returns ``compute`` as a differentiable function.

    ``compute(*inputs)`` returns tensors, ``setup_context(ctx, inputs, outputs)`` saves what
    ``backward(ctx, *grad_outputs)`` needs, as in :class:`torch.autograd.Function`. Without
    gradients to record, ``compute`` is called directly.

    PyTorch's two ways of writing a Function are both made from these: the one with a separate
    ``setup_context``, which torch.func's transforms need, costs some 25 us a call more than the one
    without, a quarter of a small layer's time, so it serves under a transform only.
    """

    def forward(ctx, *inputs):
        outputs = compute(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    eager = type(
        name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    transformed = type(
        name,
        (Function,),
        {
            "forward": staticmethod(compute),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    def apply(*inputs):
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*inputs)
        if not torch.is_grad_enabled():
            return compute(*inputs)
        return eager.apply(*inputs)

    return apply


def no_third_derivative(name: str) -> Callable:
    """Returns a backward that says so: silence would be taken for a gradient of zero."""

    def backward(ctx, *_):
        raise RuntimeError(f"{name} is differentiable twice, but a third derivative was asked for")

    return backward
