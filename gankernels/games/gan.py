"""The original GAN with dense networks (Goodfellow et al. 2014), non-saturating loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankernels import models
from gankernels.games import Adversarial, AdversarialOptions, Player, option


@dataclass(frozen=True)
class GANOptions(AdversarialOptions):
    lr: float = option(2e-4, "learning rate of the generator")
    d_lr: float = option(2e-4, "learning rate of the discriminator")
    beta1: float = option(0.5, "Adam's decay rate of the gradient's mean")
    beta2: float = option(0.999, "Adam's decay rate of the gradient's square")


class GAN(Adversarial):
    """Dense GAN, binary cross entropy, discriminator and generator in turn."""

    Options = GANOptions

    def make_generator(self) -> nn.Module:
        return models.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return models.MLPDiscriminator(self.spec.image_shape)

    def players(self) -> list[Player]:
        adam = partial(torch.optim.Adam, betas=(self.options.beta1, self.options.beta2))
        return [
            self.discriminator_player(partial(adam, lr=self.options.d_lr)),
            self.generator_player(partial(adam, lr=self.options.lr)),
        ]

    # Binary cross entropy straight from logits: -log sigmoid(x) is softplus(-x).

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        return {"real": F.softplus(-real).mean(), "fake": F.softplus(fake).mean()}

    def generator_loss(self, fake: Tensor) -> dict[str, Tensor]:
        return {"adversarial": F.softplus(-fake).mean()}
