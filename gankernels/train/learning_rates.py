"""Keeps learning rates at the addresses from which CUDA graphs read them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor


class LearningRates:
    """The learning rates of optimizers that hold them in tensors; on the CPU there are none.

    A graph reads a rate from the tensor that it captured, while callbacks, schedulers and
    checkpoints replace that tensor by another.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._rates = {
            (name, i): group["lr"]
            for name, optimizer in optimizers.items()
            for i, group in enumerate(optimizer.param_groups)
            if isinstance(group["lr"], Tensor)
        }

    def settings(self) -> Hashable:
        """Copy new rates to the captured tensors; return the other settings, fixed in a graph."""
        settings: list[Hashable] = []
        for name, optimizer in self.optimizers.items():
            for i, group in enumerate(optimizer.param_groups):
                rate = self._rates.get((name, i))
                if rate is not None and group["lr"] is not rate:
                    rate.fill_(group["lr"])
                    group["lr"] = rate
                options = (value for option, value in group.items() if option != "params")
                settings += [v if isinstance(v, Hashable) else repr(v) for v in options]
        return tuple(settings)
