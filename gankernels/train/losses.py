"""What the players' losses were since somebody last asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Who, and what of theirs: ("critic", "penalty").
Name = tuple[str, str]


class DivergenceError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message says when and whose."""


class Losses:
    """The terms of every iteration since the last report; they stay on the device until then."""

    def __init__(self, average: Callable[[Sequence[Tensor]], None] = lambda tensors: None) -> None:
        #: Replaces tensors by their means over the processes that train together.
        self.average = average
        self.history: list[tuple[int, Sequence[Name], Tensor]] = []

    def add(self, step: int, names: Sequence[Name], values: Tensor) -> None:
        """The terms of one iteration, `values` a vector with a place for every name."""
        self.history.append((step, names, values))

    def read(self) -> list[list[float]]:
        """The values of every iteration. DivergenceError names the first that is not finite."""
        if not self.history:
            return []
        flat = torch.cat([values for *_, values in self.history])
        self.average([flat])
        flat = flat.tolist()
        rows, start = [], 0
        for step, names, _ in self.history:
            row = flat[start : start + len(names)]
            start += len(names)
            for (player, term), value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    what = f"the loss term {term!r}" if term != GRADIENT_NORM else "the gradient"
                    raise DivergenceError(f"step {step}: {what} of player {player!r} is {value}")
            rows.append(row)
        return rows

    def take(self) -> dict[str, float]:
        """Means since the last call as `{"player/term": mean}`; raises as `read` does."""
        collected: dict[str, list[float]] = {}
        for row, (_, names, _) in zip(self.read(), self.history, strict=True):
            for (player, term), value in zip(names, row, strict=True):
                collected.setdefault(f"{player}/{term}", []).append(value)
        self.history.clear()
        return {name: sum(values) / len(values) for name, values in collected.items()}


#: The term under which a player's gradient norm is told.
GRADIENT_NORM = "gradient_norm"
