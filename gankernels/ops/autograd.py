"""How an op gets its derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import Function, forward_ad

from gankernels._library import called_while_tracing


def differentiable(
    name: str,
    compute: Callable,
    setup_context: Callable,
    backward: Callable,
    *,
    compilable: bool = True,
) -> Callable:
    """Returns ``compute`` as a differentiable function.

    ``compute(*inputs)`` returns tensors, ``setup_context(ctx, inputs, outputs)`` saves what
    ``backward(ctx, *grad_outputs)`` needs, as in :class:`torch.autograd.Function`. Without
    gradients to record, ``compute`` is called directly.

    PyTorch's two ways of writing a Function are both made from these: the one with a separate
    ``setup_context``, which torch.func's transforms need, costs some 25 us a call more than the one
    without, a quarter of a small layer's time, so it serves under a transform only.

    torch.compile does not look inside: where it traces a Function itself, the second derivative of
    a step with torch.func.grad in it is lost without a word, since ``backward`` is recorded as if
    nothing in it needed gradients (seen with torch 2.13). What is not ``compilable``, since it
    exchanges something with other processes, breaks the graph.
    """

    def forward(ctx, *inputs):
        outputs = compute(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    shared = {
        "backward": staticmethod(backward),
        "jvp": _missing(f"{name} has no forward-mode derivative"),
        "vmap": _missing(f"{name} has no rule for torch.vmap"),
    }
    eager = type(name, (Function,), {"forward": staticmethod(forward), **shared})
    separate = {"forward": staticmethod(compute), "setup_context": staticmethod(setup_context)}
    transformed = type(name, (Function,), {**separate, **shared})

    def apply(*inputs):
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*inputs)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return compute(*inputs)
        return eager.apply(*inputs)

    @called_while_tracing
    def hide_from_compiler() -> None:
        torch.compiler.allow_in_graph(apply)

    def function(*inputs):
        if torch.compiler.is_dynamo_compiling():
            if not compilable:
                return torch.compiler.disable(apply)(*inputs)
            hide_from_compiler()  # now, since what it calls imports the compiler
        return apply(*inputs)

    return function


def _missing(what: str) -> staticmethod:
    """Returns a method that raises, with the way out, where PyTorch tells how to write a rule."""

    def raise_error(*_):
        raise NotImplementedError(
            f'{what}; with gankernels.use_backend("reference") it is computed by PyTorch\'s ops, '
            "which have one"
        )

    return staticmethod(raise_error)


def no_third_derivative(name: str) -> Callable:
    """Returns a backward that says so: silence would be taken for a gradient of zero."""

    def backward(ctx, *_):
        raise RuntimeError(f"{name} is differentiable twice, but a third derivative was asked for")

    return backward
