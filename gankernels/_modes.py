"""Modes of networks that last for a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode; at the end every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents first: their train() reaches their children
            if module.training != training:
                module.train(training)


@contextmanager
def training_only(own: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> Iterator[None]:
    """Freeze the other parameters, and clear the gradients of a player's own before and after.

    Users may freeze parameters themselves, also during a run: a parameter that is already frozen
    stays frozen afterwards.
    """
    frozen = [parameter for parameter in others if parameter.requires_grad]
    for parameter in own:
        parameter.grad = None
    for parameter in frozen:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = True
        for parameter in own:
            parameter.grad = None
