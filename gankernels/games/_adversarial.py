"""A generator against one network that tells its images from real ones.

Here is what every such game can have, whatever its loss: a discriminator that sees statistics of
the batch, and a penalty on the discriminator's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gankernels import models
from gankernels.functional import gradient_penalty
from gankernels.games._game import Batch, DataSpec, Game, Options, Player, option
from gankernels.ops.gradient_norm_penalty import KINDS as PENALTIES


@dataclass(frozen=True)
class AdversarialOptions(Options):
    """What any game with a discriminator takes."""

    minibatch_discrimination: str | None = option(
        None, "K,C: the discriminator compares samples by K kernels of dimension C"
    )
    minibatch_stddev: bool = option(
        False, "the discriminator sees the standard deviation over groups of 4 samples"
    )
    penalty: str | None = option(
        None, f"on the discriminator's gradient: none, {', '.join(PENALTIES)}"
    )
    penalty_weight: float = option(10.0, "of the penalty's mean over the batch, without factor 1/2")
    penalty_every: int = option(1, "every how many steps, the weight then multiplied by as many")

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


class Adversarial(Game):
    """A game whose subclass makes two networks and says what each minimises of the outputs.

    Fakes are drawn once per step; the discriminator's loss and its penalty see the same ones.
    """

    Options = AdversarialOptions

    def __init__(self, spec: DataSpec, options: AdversarialOptions | None = None) -> None:
        super().__init__(spec, options)
        self.generator = self.make_generator()
        self.discriminator = models.with_batch_statistics(
            self.make_discriminator(), self.options.minibatch_stddev, self.options.kernels()
        )

    def make_generator(self) -> nn.Module:
        raise TypeError(f"{type(self).__name__} does not say which generator: make_generator()")

    def make_discriminator(self) -> nn.Module:
        raise TypeError(f"{type(self).__name__} does not say what plays against the generator")

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The terms, from the discriminator's outputs `(N,)`, float32, for real and fake images."""
        raise TypeError(f"{type(self).__name__} does not say what its discriminator minimises")

    def generator_loss(self, fake: Tensor) -> dict[str, Tensor]:
        """The terms, from the discriminator's outputs `(N,)`, float32, for fake images."""
        raise TypeError(f"{type(self).__name__} does not say what its generator minimises")

    def judge(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, fake_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The discriminator's outputs for real and fake images, float32.

        In one go where that changes nothing; a discriminator that normalises over its batch has to
        see real and fake images in batches of their own. Fakes have the same labels by default.
        """
        fake_labels = labels if fake_labels is None else fake_labels
        if getattr(self.discriminator, "per_sample", False):
            both = None if labels is None else torch.cat([labels, fake_labels])
            real, fake = self.discriminator(torch.cat([real, fake]), both).float().chunk(2)
            return real, fake
        real = self.discriminator(real, labels)
        return real.float(), self.discriminator(fake, fake_labels).float()

    def discriminator_player(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        name: str = "discriminator",
        steps: int = 1,
        after_step: Callable[[], None] | None = None,
    ) -> Player:
        """The discriminator as a player, under its penalty where the options ask for one."""
        options = self.options

        def loss(batch: Batch, rng: torch.Generator, penalised: bool = False) -> dict[str, Tensor]:
            labels = self.condition(batch.labels)
            images = self.fake(batch.labels, rng)
            terms = self.discriminator_loss(*self.judge(batch.images, images, labels))
            if penalised:
                penalty = gradient_penalty(
                    self.discriminator,
                    batch.images,
                    images,
                    kind=options.penalty,
                    critic_args=(labels,),
                    generator=rng,
                )
                terms["penalty"] = options.penalty_weight * options.penalty_every * penalty
            return terms

        def penalised_loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            return loss(batch, rng, penalised=True)

        return Player(
            name,
            self.discriminator,
            loss,
            optimizer,
            steps,
            after_step,
            None if options.penalty is None else penalised_loss,
            options.penalty_every,
        )

    def generator_player(
        self, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> Player:
        def loss(batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            images = self.fake(batch.labels, rng)
            return self.generator_loss(
                self.discriminator(images, self.condition(batch.labels)).float()
            )

        return Player("generator", self.generator, loss, optimizer)
