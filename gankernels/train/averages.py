"""Moving averages of networks (EMA), which make better samples than the networks themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverages(Mapping[str, nn.Module]):
    """Copies of a module's children, in evaluation mode, that follow their weights.

    Args:
        module: the owner of the networks.
        names: the attributes that hold them.
        decay: the share of the average that an update keeps. With 0 there are no averages.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], decay: float) -> None:
        self.module, self.decay = module, decay
        networks = {name: getattr(module, name) for name in names} if decay else {}
        self._averages = {
            name: copy.deepcopy(network).requires_grad_(False).eval()
            for name, network in networks.items()
        }
        self._current = [t for network in networks.values() for t in _floating(network)]
        self._followers = [t for network in self._averages.values() for t in _floating(network)]

    def __getitem__(self, name: str) -> nn.Module:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averages of weights and floating-point buffers towards the networks."""
        if self._averages:
            torch._foreach_lerp_(self._followers, self._current, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module's networks are replaced by their averages."""
        networks = {name: getattr(self.module, name) for name in self}
        for name, average in self.items():
            setattr(self.module, name, average)
        try:
            yield
        finally:
            for name, network in networks.items():
                setattr(self.module, name, network)


def _floating(module: nn.Module) -> list[Tensor]:
    """Weights and running statistics, but not the batch counters."""
    return [t for t in module.state_dict().values() if t.is_floating_point()]
