"""The original GAN with dense networks (Goodfellow et al. 2014), non-saturating loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankernels import models
from gankernels.games import Batch, Game, Options, Player, option


@dataclass(frozen=True)
class GANOptions(Options):
    lr: float = option(2e-4, "learning rate of the generator")
    d_lr: float = option(2e-4, "learning rate of the discriminator")
    beta1: float = option(0.5, "Adam's decay rate of the gradient's mean")
    beta2: float = option(0.999, "Adam's decay rate of the gradient's square")


class GAN(Game):
    """Dense GAN, binary cross entropy, discriminator and generator in turn."""

    Options = GANOptions

    def __init__(self, spec, options=None) -> None:
        super().__init__(spec, options)
        self.generator = self.make_generator()
        self.discriminator = self.make_discriminator()

    def make_generator(self) -> nn.Module:
        return models.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return models.MLPDiscriminator(self.spec.image_shape)

    def players(self) -> list[Player]:
        adam = partial(torch.optim.Adam, betas=(self.options.beta1, self.options.beta2))
        return [
            Player(
                "discriminator",
                self.discriminator,
                self.discriminator_loss,
                partial(adam, lr=self.options.d_lr),
            ),
            Player(
                "generator",
                self.generator,
                self.generator_loss,
                partial(adam, lr=self.options.lr),
            ),
        ]

    def discriminator_loss(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        labels = self.condition(batch.labels)
        real = self.discriminator(batch.images, labels)
        fake = self.discriminator(self.fake(batch.labels, rng), labels)
        # Binary cross entropy straight from logits: -log sigmoid(x) is softplus(-x).
        return {
            "real": F.softplus(-real.float()).mean(),
            "fake": F.softplus(fake.float()).mean(),
        }

    def generator_loss(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        fake = self.fake(batch.labels, rng)
        logits = self.discriminator(fake, self.condition(batch.labels))
        return {"adversarial": F.softplus(-logits.float()).mean()}
