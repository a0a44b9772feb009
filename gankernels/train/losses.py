"""Accumulates the loss terms of the players between two reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A player and a term of its loss: ("critic", "penalty").
Name = tuple[str, str]
#: Iterations whose terms are kept separately before they are summed.
MOST_KEPT = 1000
#: Sentinel instead of a step: no value was infinite or NaN.
NEVER = torch.iinfo(torch.int64).max


class DivergenceError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message names step and player."""


@dataclass
class Sums:
    """The sums of iterations with the same terms; on the device, with a place for every term."""

    count: int
    total: Tensor
    first: Tensor  # step of the first value that is not finite, or NEVER
    value: Tensor  # that value

    @classmethod
    def of(cls, steps: Sequence[int], rows: Tensor) -> Sums:
        """Sums over rows, one per iteration, without waiting for the device."""
        on = torch.tensor(steps, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
        bad = ~rows.isfinite()
        index = bad.int().argmax(0)  # argmax returns the first maximum
        first = torch.where(bad.any(0), on[index], NEVER)
        return cls(len(steps), rows.sum(0), first, rows.gather(0, index[None])[0])

    def __add__(self, later: Sums) -> Sums:
        return Sums(
            self.count + later.count,
            self.total + later.total,
            torch.minimum(self.first, later.first),
            torch.where(self.first < NEVER, self.value, later.value),
        )


class Losses:
    """The terms of all iterations since the last report; they stay on the device until then."""

    def __init__(self, average: Callable[[Sequence[Tensor]], None] = lambda tensors: None) -> None:
        #: Replaces tensors by their means over the processes that train together.
        self.average = average
        self.history: list[tuple[int, Sequence[Name], Tensor]] = []
        self.sums: dict[Sequence[Name], Sums] = {}

    def add(self, step: int, names: Sequence[Name], values: Tensor) -> None:
        """The terms of one iteration, `values` a vector with a place for every name."""
        self.history.append((step, tuple(names), values))
        if len(self.history) == MOST_KEPT:
            self._sum_up()

    def check(self) -> None:
        """Raises DivergenceError where a value is not finite; it names the first."""
        self._sum_up()
        if not self.sums:
            return
        names = [name for terms in self.sums for name in terms]
        steps = torch.cat([sums.first for sums in self.sums.values()]).tolist()
        step = min(steps)
        if step < NEVER:
            place = steps.index(step)
            player, term = names[place]
            value = torch.cat([sums.value for sums in self.sums.values()])[place].item()
            what = f"the loss term {term!r}" if term != GRADIENT_NORM else "the gradient"
            raise DivergenceError(f"step {step}: {what} of player {player!r} is {value}")

    def take(self) -> dict[str, float]:
        """Means since the last call as `{"player/term": mean}`; raises as `check` does."""
        self.check()
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, sums in self.sums.items():
            for (player, term), total in zip(names, sums.total.tolist(), strict=True):
                name = f"{player}/{term}"
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + sums.count
        self.sums.clear()
        return {name: total / counts[name] for name, total in totals.items()}

    def _sum_up(self) -> None:
        """Move the history into the sums, without waiting for the device."""
        if not self.history:
            return
        flat = torch.cat([values for *_, values in self.history])
        self.average([flat])
        alike: dict[Sequence[Name], list[tuple[int, Tensor]]] = {}
        parts = flat.split([len(names) for _, names, _ in self.history])
        for (step, names, _), part in zip(self.history, parts, strict=True):
            alike.setdefault(names, []).append((step, part))
        self.history.clear()
        for names, entries in alike.items():
            steps, rows = zip(*entries, strict=True)
            sums = Sums.of(steps, torch.stack(rows))
            self.sums[names] = self.sums[names] + sums if names in self.sums else sums


#: The term under which a player's gradient norm is reported.
GRADIENT_NORM = "gradient_norm"
