"""Games with one generator and one discriminator.

What every such game can have, whatever its loss: a discriminator that sees statistics of the batch,
and a penalty on the discriminator's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gankernels import networks
from gankernels._options import option
from gankernels.data import Spec
from gankernels.functional import gradient_penalty
from gankernels.games._game import BareOptions, Batch, Game, Options, Player
from gankernels.ops.gradient_norm_penalty import KINDS as PENALTIES


@dataclass(frozen=True)
class DiscriminatorOptions(BareOptions):
    """What any game with a discriminator takes."""

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
        if self.penalty is not None and self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be none, {', '.join(PENALTIES)}, got {self.penalty!r}")
        if self.penalty_every < 1:
            raise ValueError(f"penalty_every must be at least 1, got {self.penalty_every}")

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
    """What a game takes whose generator starts from noise and meets a discriminator."""


class Round:
    """All that a loss can look at: each part is computed when it is first asked for.

    Attributes:
        batch: the real data.
        made: what the game makes for them, by column.
        real, fake: the discriminator's outputs for the real data and for what was made, float32.
    """

    def __init__(
        self, game: Adversarial, batch: Batch, rng: torch.Generator, *, together: bool
    ) -> None:
        self.game, self.batch, self.rng, self.together = game, batch, rng, together

    @cached_property
    def made(self) -> Mapping[str, Tensor]:
        # A generator needs a graph of its own; all others take what was made for a shared batch.
        if self.together and self.batch.made is not None:
            return self.batch.made
        made = self.game.make(self.batch, self.rng)
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
        return self.game.judge_both(self.batch, self.made)

    def _judge(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.game.judge(values, self.batch).float()


class Adversarial(Game):
    """A game whose subclass makes two networks and says what each minimizes of a `Round`."""

    Options = AdversarialOptions

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

        What was made may bring conditions of its own; those of the batch fill in.
        """
        conditions = (values[n] if n in values else batch[n] for n in self.given)
        return values[self.makes], *conditions

    def judge(self, values: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The discriminator's outputs for real or made values."""
        return self.discriminator(*self.judged(values, batch))

    def judge_both(self, batch: Batch, made: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The discriminator's outputs for real and made values, float32.

        In one call where that changes nothing; a discriminator that normalizes over its batch has
        to see real and made values in batches of their own.
        """
        real, fake = self.judged(batch, batch), self.judged(made, batch)
        if not getattr(self.discriminator, "per_sample", False):
            return self.discriminator(*real).float(), self.discriminator(*fake).float()
        both = [torch.cat(pair) for pair in zip(real, fake, strict=True)]
        real, fake = self.discriminator(*both).float().chunk(2)
        return real, fake

    def discriminator_player(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        name: str = "discriminator",
        **settings: Any,
    ) -> Player:
        """The discriminator as a player, under its penalty where the options ask for one.

        Args:
            settings: further arguments of `Player`.
        """
        options = self.options

        def loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            return self.discriminator_loss(Round(self, batch, rng, together=True))

        def penalized_loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            round = Round(self, batch, rng, together=True)
            terms = self.discriminator_loss(round)
            real, *arguments = self.judged(batch, batch)
            fake, *_ = self.judged(round.made, batch)
            penalty = gradient_penalty(
                self.discriminator,
                real,
                fake,
                kind=options.penalty,
                critic_args=arguments,
                generator=rng,
            )
            terms["penalty"] = options.penalty_weight * options.penalty_every * penalty
            return terms

        if options.penalty is not None:
            settings |= {"lazy_loss": penalized_loss, "lazy_every": options.penalty_every}
        return Player(name, self.discriminator, loss, optimizer, **settings)

    def generator_player(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        name: str = "generator",
        **settings: Any,
    ) -> Player:
        """The generator as a player."""

        def loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            return self.generator_loss(Round(self, batch, rng, together=False))

        return Player(name, self.generator, loss, optimizer, **settings)
