"""Builds twice differentiable ops from their forward, backward and double backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import unwrap_if_dead  # a tensor of a transform that has ended
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling

from gankernels._library import called_while_tracing

Result: TypeAlias = Tensor | tuple[Tensor | None, ...]
Pass: TypeAlias = Callable[..., Result]
Saves: TypeAlias = Callable[[Sequence[Any], Any], Sequence[Tensor | None]]


@dataclass(frozen=True)
class DifferentiableOp:
    """The result of `define_op`: its arguments, and the op as a function that autograd records."""

    apply: Callable[..., Any]
    forward: Pass
    backward: Pass
    double_backward: Pass
    saves: Saves | None


def define_op(
    name: str,
    *,
    forward: Pass,
    backward: Pass,
    double_backward: Pass,
    saves: Saves | None = None,
    collective: bool = False,
) -> DifferentiableOp:
    """Defines an op with a first and a second derivative; a third raises an error.

    Every pass takes ``options``, one object with everything that is not a tensor. The derivatives
    also take ``wanted``: a bool for each gradient that they return, False if it will not be used.
    Then it may be anything, or None, which it must be if its input is None. Gradients at the end
    may be left out.

    Args:
        name: the name of the op, in snake_case.
        forward: ``(*inputs, options)`` -> outputs, of which only the first is differentiable.
        backward: ``(grad_output, *saved, options, wanted)`` -> the gradients of the inputs.
        double_backward: ``(*tangents, grad_output, *saved, options, wanted)`` -> the gradients of
            ``grad_output`` and of the saved tensors. There is a tangent for each gradient that
            ``backward`` returns; it is None if nothing depends on that gradient.
        saves: ``(inputs, outputs)`` -> the tensors that the derivatives need, if there is more than
            one output; otherwise these are the inputs.
        collective: the passes exchange tensors with other processes. Each of them then runs
            whatever gradients are asked for, so that all processes run the same ones.
    """

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], outputs: Result) -> None:
        *tensors, ctx.options = inputs
        ctx.set_materialize_grads(False)
        if saves is None:
            ctx.save_for_backward(*tensors)
        else:
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.save_for_backward(*saves(tensors, outputs))

    def differentiate(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_output is None and not collective:
            return (None,) * len(needed)
        gradients = apply_backward(grad_output, *ctx.saved_tensors, ctx.options, needed)
        return _padded(gradients, len(needed))

    def save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], outputs: Result) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-2])
        ctx.options = inputs[-2]

    def differentiate_twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if tangents[0] is None and not collective and all(t is None for t in tangents):
            return (None,) * len(needed)
        gradients = apply_double(*tangents, *ctx.saved_tensors, ctx.options, needed)
        return _padded(gradients, len(needed))

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], outputs: Result) -> None:
        pass

    def raise_error(ctx: Any, *_: object) -> None:  # None would be taken for a gradient of zero
        raise RuntimeError(f"{name} is differentiable twice, but a third derivative was asked for")

    def function(suffix: str, *methods: Callable[..., Any]) -> Callable[..., Any]:
        return differentiable(name + suffix, *methods, compilable=not collective)

    apply_double = function("_double_backward", double_backward, save_nothing, raise_error)
    apply_backward = function("_backward", backward, save_for_double_backward, differentiate_twice)
    apply = function("", forward, save_for_backward, differentiate)
    return DifferentiableOp(apply, forward, backward, double_backward, saves)


def _padded(gradients: Result, size: int) -> tuple[Tensor | None, ...]:
    """The gradients, then None for all other inputs."""
    if isinstance(gradients, Tensor):
        return gradients, *(None,) * (size - 1)
    return gradients + (None,) * (size - len(gradients))


def differentiable(
    name: str,
    compute: Pass,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Result | None],
    *,
    compilable: bool = True,
) -> Callable[..., Any]:
    """Returns ``compute`` as a differentiable function.

    ``compute(*inputs)`` returns tensors, ``setup_context(ctx, inputs, outputs)`` saves what
    ``backward(ctx, *grad_outputs)`` needs, as in :class:`torch.autograd.Function`. If there are no
    gradients to record, ``compute`` is called directly.

    PyTorch has two forms of a Function, and this makes both. The one with a separate
    ``setup_context``, which torch.func's transforms need, costs about 25 us more per call, a
    quarter of a small layer's time, and is therefore used under a transform only.

    torch.compile does not trace into the function: if it traces a Function itself, the second
    derivative of a step with torch.func.grad inside is silently lost, since ``backward`` is
    recorded as if nothing in it needed gradients (seen with torch 2.13). A function that is not
    ``compilable``, since it exchanges tensors with other processes, breaks the graph.
    """

    def forward(ctx: Any, *inputs: Any) -> Result:
        outputs = compute(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs

    node = name.title().replace("_", "")  # PyTorch appends Backward to it
    shared = {
        "backward": staticmethod(backward),
        "jvp": _missing(f"{name} has no forward-mode derivative"),
        "vmap": _missing(f"{name} has no rule for torch.vmap"),
    }
    eager: Any = type(node, (Function,), {"forward": staticmethod(forward), **shared})
    separate = {"forward": staticmethod(compute), "setup_context": staticmethod(setup_context)}
    transformed: Any = type(node, (Function,), {**separate, **shared})

    # Function.apply without its handling of default arguments, which takes 2 us of every call.
    record = super(Function, eager).apply

    def apply(*inputs: Any) -> Any:
        if _are_functorch_transforms_active():
            return transformed.apply(*inputs)
        if not is_grad_enabled() and forward_ad._current_level < 0:
            return compute(*inputs)
        return record(*[unwrap_if_dead(t) if isinstance(t, Tensor) else t for t in inputs])

    @called_while_tracing
    def hide_from_compiler() -> None:
        torch.compiler.allow_in_graph(apply)

    def function(*inputs: Any) -> Any:
        if is_dynamo_compiling():
            if not compilable:
                return torch.compiler.disable(apply)(*inputs)
            hide_from_compiler()  # not earlier, since it imports the compiler
        return apply(*inputs)

    return function


def _missing(what: str) -> staticmethod[..., None]:
    """A method that raises an error with the workaround; PyTorch's error explains how to write a
    rule."""

    def raise_error(*_: object) -> None:
        raise NotImplementedError(
            f'{what}; with gankernels.use_backend("reference") it is computed by PyTorch\'s ops, '
            "which have one"
        )

    return staticmethod(raise_error)
