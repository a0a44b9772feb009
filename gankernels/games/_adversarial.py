"""Games with one generator and one discriminator.

In every such game, whatever its loss, the discriminator can see statistics of the batch, and can
have a penalty on its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gankernels import networks
from gankernels._options import option
from gankernels.data import Spec
from gankernels.games._game import BareOptions, Batch, Game, Options, Player
from gankernels.games._round import Penalty, Round, adversary
from gankernels.ops.gradient_norm_penalty import KINDS as PENALTIES


@dataclass(frozen=True)
class DiscriminatorOptions(BareOptions):
    """The options of any game with a discriminator."""

    minibatch_discrimination: str | None = option(
        None, "K,C: the discriminator compares samples by K kernels of dimension C"
    )
    minibatch_stddev: bool = option(
        False, "the discriminator sees the standard deviation over groups of 4 samples"
    )
    penalty: str | None = option(
        None, f"penalty on the discriminator's gradient: none, {', '.join(PENALTIES)}"
    )
    penalty_weight: float = option(10.0, "weight of the penalty (batch mean, no factor 1/2)")
    penalty_every: int = option(1, "apply the penalty every N steps, scaled by N")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kernels()
        Penalty(self.penalty or Penalty.kind, self.penalty_weight, self.penalty_every)  # checks

    def gradient_penalty(self) -> Penalty | None:
        """The penalty on the discriminator's gradient, if there is one."""
        if self.penalty is None:
            return None
        return Penalty(self.penalty, self.penalty_weight, self.penalty_every)

    def kernels(self) -> tuple[int, int] | None:
        """The number and the dimension of the minibatch discrimination's kernels."""
        if self.minibatch_discrimination is None:
            return None
        try:
            number, dimension = map(int, self.minibatch_discrimination.split(","))
        except ValueError:
            number = dimension = 0
        if number < 1 or dimension < 1:
            raise ValueError(
                "minibatch_discrimination must be K,C, two positive whole numbers such as 100,5, "
                f"got {self.minibatch_discrimination!r}"
            )
        return number, dimension


@dataclass(frozen=True)
class AdversarialOptions(DiscriminatorOptions, Options):
    """The options of a game with a discriminator whose generator starts from noise."""


class Adversarial(Game):
    """A game of a generator against a discriminator; a subclass makes both and defines losses."""

    Options: ClassVar[type[BareOptions]] = AdversarialOptions
    options: DiscriminatorOptions

    def __init__(self, spec: Spec, options: DiscriminatorOptions | None = None) -> None:
        super().__init__(spec, options)
        self.generator = self.make_generator()
        self.discriminator = networks.with_batch_statistics(
            self.make_discriminator(), self.options.minibatch_stddev, self.options.kernels()
        )

    def make_generator(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must define make_generator()")

    def make_discriminator(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must define make_discriminator()")

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        """The terms that the discriminator minimizes."""
        raise NotImplementedError(f"{type(self).__name__} must define discriminator_loss()")

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        """The terms that the generator minimizes."""
        raise NotImplementedError(f"{type(self).__name__} must define generator_loss()")

    def judged(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The discriminator's arguments for real or made values. The penalty is on the first.

        Made values may include their own conditions; missing ones are taken from the batch.
        """
        conditions = (values[n] if n in values else batch[n] for n in self.given)
        return values[self.makes], *conditions

    def judge(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The discriminator's outputs for real or made values."""
        return self.discriminator(*self.judged(values, batch))

    def discriminator_player(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        name: str = "discriminator",
        **settings: Any,
    ) -> Player:
        """The discriminator as a player, with the penalty of the options if there is one.

        Args:
            settings: further arguments of `Player`.
        """
        return adversary(
            name,
            self.discriminator,
            self.discriminator_loss,
            optimizer,
            make=self.make,
            judged=self.judged,
            penalty=self.options.gradient_penalty(),
            **settings,
        )

    def generator_player(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        name: str = "generator",
        **settings: Any,
    ) -> Player:
        """The generator as a player."""

        def loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            round = Round(
                batch,
                rng,
                make=self.make,
                network=self.discriminator,
                judged=self.judged,
                together=False,
            )
            return self.generator_loss(round)

        return Player(name, self.generator, loss, optimizer, **settings)
