"""The original GAN with dense networks (Goodfellow et al. 2014), non-saturating loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gankernels import networks, optim
from gankernels.games import (
    Adversarial,
    AdversarialOptions,
    BareOptions,
    Player,
    Round,
    option,
)


@dataclass(frozen=True)
class GANOptions(AdversarialOptions):
    lr: float = option(2e-4, "learning rate of the generator")
    d_lr: float = option(2e-4, "learning rate of the discriminator")
    beta1: float = option(0.5, "Adam's beta1")
    beta2: float = option(0.999, "Adam's beta2")


class GAN(Adversarial):
    """Dense GAN, binary cross entropy, discriminator and generator in turn."""

    Options: ClassVar[type[BareOptions]] = GANOptions
    options: GANOptions

    def make_generator(self) -> nn.Module:
        return networks.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return networks.MLPDiscriminator(self.spec.image_shape)

    def players(self) -> list[Player]:
        adam = partial(optim.Adam, betas=(self.options.beta1, self.options.beta2))
        return [
            self.discriminator_player(partial(adam, lr=self.options.d_lr)),
            self.generator_player(partial(adam, lr=self.options.lr)),
        ]

    # Binary cross entropy computed from logits: -log sigmoid(x) is softplus(-x).

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"real": F.softplus(-round.real).mean(), "fake": F.softplus(round.fake).mean()}

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"adversarial": F.softplus(-round.fake).mean()}
