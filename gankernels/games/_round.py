"""A player that distinguishes real values from made ones: the inputs of its loss, its penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gankernels.functional import gradient_penalty
from gankernels.games._game import Batch, Player
from gankernels.ops.gradient_norm_penalty import KINDS as PENALTIES

#: Makes values for a batch, by column, such as `Game.make`.
Make = Callable[[Batch, torch.Generator | None], Mapping[str, Tensor]]
#: `judged(values, batch)`: a network's arguments for the real or made values of a batch.
Judged = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Any, ...]]


class Round:
    """All that a loss can use: each part is computed at its first use.

    Args:
        batch: the real data.
        rng: the only source of randomness.
        make: makes values for the batch.
        network: the network that distinguishes them from real ones.
        judged: the arguments of the network.
        together: whether no gradients of the made values are needed, so that players of a shared
            batch use the same values, and the network judges real and made ones in one call if
            that changes nothing.

    Attributes:
        made: the values made for the batch, by column.
        real, fake: the network's outputs for the real and the made values, float32.
    """

    def __init__(
        self,
        batch: Batch,
        rng: torch.Generator,
        *,
        make: Make,
        network: nn.Module,
        judged: Judged,
        together: bool,
    ) -> None:
        self.batch, self.rng, self.make = batch, rng, make
        self.network, self.judged, self.together = network, judged, together

    @cached_property
    def made(self) -> Mapping[str, Tensor]:
        # A generator needs its own autograd graph; all others use the values of a shared batch.
        if self.together and self.batch.made is not None:
            return self.batch.made
        made = self.make(self.batch, self.rng)
        self.batch.made = {name: value.detach() for name, value in made.items()}
        return made

    @cached_property
    def real(self) -> Tensor:
        return self._both[0] if self.together else self._judge(self.batch)

    @cached_property
    def fake(self) -> Tensor:
        return self._both[1] if self.together else self._judge(self.made)

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        real, fake = self.judged(self.batch, self.batch), self.judged(self.made, self.batch)
        return judge_both(self.network, real, fake)

    def _judge(self, values: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.network(*self.judged(values, self.batch))
        return output.float()


def judge_both(
    network: nn.Module, real: tuple[Any, ...], fake: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The network's outputs for the arguments of real and of made values, float32.

    It is called once if that changes nothing; a network that normalizes over its batch must see
    real and made values in separate batches.
    """
    if not getattr(network, "per_sample", False):
        return network(*real).float(), network(*fake).float()
    both = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
    real_output, fake_output = network(*both).float().chunk(2)
    return real_output, fake_output


@dataclass(frozen=True)
class Penalty:
    """A penalty on the gradient of a network with respect to its first argument.

    Args:
        kind: see `gankernels.functional.gradient_penalty`.
        weight: the factor of the penalty, a mean over the batch.
        every: lazy regularization: the penalty is in the loss on every N-th step only, N-fold.
    """

    kind: str = "wgan-gp"
    weight: float = 10.0
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in PENALTIES:
            raise ValueError(f"penalty must be none, {', '.join(PENALTIES)}, got {self.kind!r}")
        if self.every < 1:
            raise ValueError(f"penalty_every must be at least 1, got {self.every}")

    def of(self, round: Round) -> Tensor:
        """The term to add to the loss of a round."""
        real, *arguments = round.judged(round.batch, round.batch)
        fake, *_ = round.judged(round.made, round.batch)
        penalty = gradient_penalty(
            round.network,
            real,
            fake,
            kind=self.kind,
            critic_args=arguments,
            generator=round.rng,
        )
        return self.weight * self.every * penalty


def adversary(
    name: str,
    network: nn.Module,
    loss: Callable[[Round], dict[str, Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    *,
    make: Make,
    judged: Judged,
    penalty: Penalty | None = None,
    **settings: Any,
) -> Player:
    """A player that distinguishes real values from made ones, with a penalty if there is one.

    A game may have several, such as one network per domain.

    Args:
        name: see `Player`.
        network: the network that it trains.
        loss: the terms that it minimizes.
        optimizer: see `Player`.
        make: makes values for a batch, such as `game.make`.
        judged: the network's arguments; the penalty is on the first.
        settings: further arguments of `Player`.
    """

    def round_of(batch: Batch, rng: torch.Generator) -> Round:
        return Round(batch, rng, make=make, network=network, judged=judged, together=True)

    def plain_loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        return loss(round_of(batch, rng))

    if penalty is not None:
        chosen = penalty

        def penalized_loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            round = round_of(batch, rng)
            return {**loss(round), "penalty": chosen.of(round)}

        settings |= {"lazy_loss": penalized_loss, "lazy_every": penalty.every}
    return Player(name, network, plain_loss, optimizer, **settings)
