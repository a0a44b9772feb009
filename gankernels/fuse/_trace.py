"""Traces every path through a forward as a torch.fx graph."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import fx, nn

from gankernels.fuse._source import Source, UnreadableError, refuses

#: Limits of tracing: tests of a tensor or its shape on one path through a forward, paths, and
#: optional arguments.
_MOST_CHOICES, _MOST_WAYS, _MOST_ARGUMENTS = 12, 64, 5
DEPENDS_ON_TYPES = "it may depend on the types of layers or arguments"


class UntraceableError(Exception):
    """A forward whose paths are not all known."""


class _Tracer(fx.Tracer):
    """Takes given branches when the code tests a tensor (or an argument)."""

    proxy_buffer_attributes = True  # so that no actual buffer is read or written

    def __init__(self, choices: list[bool]) -> None:
        super().__init__()
        self.choices = choices
        self.chosen: list[bool] = []

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        node = super().create_node(*args, **options)
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        i = len(self.chosen)
        if i == _MOST_CHOICES:
            raise UntraceableError("it decides by values too often")
        self.chosen.append(self.choices[i] if i < len(self.choices) else True)
        return self.chosen[-1]


def traces(owner: nn.Module) -> list[fx.Graph]:
    """The graphs of a module's forward with its children as black boxes: in training and
    evaluation, with and without each optional argument, along every branch."""
    if "forward" in vars(owner):
        raise UntraceableError("it is replaced")
    try:
        source = Source(type(owner))
    except UnreadableError as error:
        raise UntraceableError(str(error)) from error
    if source.asks_for_types:
        raise UntraceableError(DEPENDS_ON_TYPES)
    if source.catches_errors:
        raise UntraceableError("it catches exceptions")
    arguments = list(inspect.signature(type(owner).forward).parameters.values())[2:]
    arguments = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if len(arguments) > _MOST_ARGUMENTS:
        raise UntraceableError("it has too many arguments")
    graphs = []
    for training, *given in itertools.product((True, False), repeat=1 + len(arguments)):
        missing = [a for a, is_given in zip(arguments, given, strict=True) if not is_given]
        try:
            owner.training = training
            graphs += _branches(owner, {a.name: None for a in missing})
        except UntraceableError:
            if all(a.default is None for a in missing):  # or this one is never left out
                raise
    if not graphs:
        raise UntraceableError("it raises an error")
    return graphs


def _branches(owner: nn.Module, concrete: dict[str, Any]) -> list[fx.Graph]:
    graphs = []
    pending: list[list[bool]] = [[]]
    ways = 0
    while pending:
        ways += 1
        if ways > _MOST_WAYS:
            raise UntraceableError("it has too many branches")
        tracer = _Tracer(pending.pop())
        try:
            graphs.append(tracer.trace(owner, concrete))
        except UntraceableError:
            raise
        except Exception as error:
            if not refuses(error):
                message = str(error).strip().splitlines() or [""]
                raise UntraceableError(f"{type(error).__name__}: {message[0]}") from error
        for i in range(len(tracer.choices), len(tracer.chosen)):
            pending.append([*tracer.chosen[:i], False])
    return graphs
