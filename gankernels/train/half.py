"""Half-precision copies of weights, which last as long as the weights stay the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from contextvars import Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks

from gankernels.nn.cpu import OneDNNLinear
from gankernels.nn.cpu.linear import HalfCopies, half_copies
from gankernels.optim import Adam


class HalfWeights:
    """Copies of a network's float32 linear weights on a CPU, in the dtype of autocast.

    In a `with` block, :class:`gankernels.nn.cpu.OneDNNLinear` computes with them. They are part of
    the graph: gradients reach the parameters, in float32. Whoever changes parameters calls
    `refresh`; in the block, parameters do not change. Layers that hold other tensors instead, as in
    :func:`torch.func.functional_call`, cast those as autocast does.

    Args:
        network: where the layers are.
        dtype: of the copies. With None, or on another device, there are none.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._sink = _Sink()
        self._copies: dict[Tensor, _Copy] = {}
        self._tokens: list[Token[HalfCopies | None]] = []
        if dtype is None:
            return
        for layer in network.modules():
            for p in layer.parameters(recurse=False) if isinstance(layer, OneDNNLinear) else ():
                if p.is_cpu and p.dtype == torch.float32 and p not in self._copies:
                    self._copies[p] = _Copy(p, dtype, self._sink)

    def __enter__(self) -> HalfWeights:
        self._tokens.append(half_copies.set(self if self._copies else None))
        return self

    def __exit__(self, *error: object) -> None:
        half_copies.reset(self._tokens.pop())

    def of(self, parameter: Tensor) -> Tensor:
        """The copy of this parameter, or the parameter itself where there is none."""
        copy = self._copies.get(parameter)
        return parameter if copy is None else copy()

    def refresh(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copy these parameters again, by default all.

        A graph that was made with the copies of before can then no longer be differentiated.
        """
        for parameter in self._copies if parameters is None else parameters:
            if parameter in self._copies:
                self._copies[parameter].value.copy_(parameter.detach())

    def serve(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the steps of :class:`gankernels.optim.Adam` write copies and read gradients here."""
        if isinstance(optimizer, Adam) and self.dtype == torch.bfloat16:
            copied = (p for p in _parameters(optimizer) if p in self._copies)
            optimizer.copies = {p: self._copies[p].value for p in copied}
            optimizer.half_gradients = self._sink.gradients

    def refresh_after(self, optimizer: torch.optim.Optimizer) -> None:
        """`refresh` what a step of this optimizer has changed and not written by itself."""
        if optimizer._optimizer_step_post_hooks or hooks._global_optimizer_post_hooks:
            self.refresh()  # hooks may change any weight
            return
        written = optimizer.copies if isinstance(optimizer, Adam) else {}
        self.refresh(p for p in _parameters(optimizer) if p not in written)

    @contextmanager
    def gradients(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """In the `with` block, a backward pass leaves gradients of copies in half precision.

        The optimizer's next step reads them. Nothing changes for an optimizer that cannot, and for
        parameters with hooks, which expect a float32 gradient.
        """
        self._sink.gradients.clear()
        if isinstance(optimizer, Adam) and optimizer.copies and optimizer.takes_half_gradients:
            self._sink.wanted = {p for p in optimizer.copies if not _has_hooks(p)}
        try:
            yield
        finally:
            self._sink.wanted = frozenset()


class _Sink:
    """Where backward passes leave the gradients that are wanted in half precision.

    The graph refers to this object and not to the copies, which refer to the graph.
    """

    def __init__(self) -> None:
        self.wanted: Set[Tensor] = frozenset()
        self.gradients: dict[Tensor, Tensor] = {}

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        before = self.gradients.get(parameter)
        self.gradients[parameter] = gradient if before is None else before + gradient


class _Copy:
    def __init__(self, parameter: Tensor, dtype: torch.dtype, sink: _Sink) -> None:
        self.parameter = parameter
        self.value = parameter.detach().to(dtype)
        self.sink = sink
        self.tracked: Tensor | None = None

    def __call__(self) -> Tensor:
        if not (self.parameter.requires_grad and torch.is_grad_enabled()):
            return self.value
        # One node of the graph for all uses, so that their gradients are added up before they are
        # cast back, as under autocast.
        if self.tracked is None:
            self.tracked = _AsCopied.apply(self.parameter, self.value, self.sink)
        return self.tracked


class _AsCopied(torch.autograd.Function):
    """The cast of a parameter, which has been computed before."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor, sink: _Sink) -> Tensor:
        ctx.parameter, ctx.sink = parameter, sink
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.parameter in ctx.sink.wanted:
            ctx.sink.add(ctx.parameter, grad)
            return None, None, None
        return grad.to(ctx.parameter.dtype), None, None


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)
