"""Wasserstein GAN with weight clipping (Arjovsky, Chintala & Bottou 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gankernels import networks
from gankernels.games import Adversarial, AdversarialOptions, Player, Round, option


@dataclass(frozen=True)
class WGANOptions(AdversarialOptions):
    lr: float = option(5e-5, "learning rate of the generator")
    d_lr: float = option(5e-5, "learning rate of the critic")
    n_critic: int = option(5, "critic steps per generator step")
    clip: float = option(0.01, "the critic's weights stay in [-clip, clip]")


class WGAN(Adversarial):
    """Dense Wasserstein GAN: weight clipping, RMSprop, several critic steps per generator step."""

    Options = WGANOptions

    def make_generator(self) -> nn.Module:
        return networks.MLPGenerator(self.options.latent_dim, self.spec.image_shape)

    def make_discriminator(self) -> nn.Module:
        return networks.MLPDiscriminator(self.spec.image_shape)

    def players(self) -> list[Player]:
        return [
            self.discriminator_player(
                partial(torch.optim.RMSprop, lr=self.options.d_lr),
                name="critic",
                steps=self.options.n_critic,
                after_step=self.clip_critic,
            ),
            self.generator_player(partial(torch.optim.RMSprop, lr=self.options.lr)),
        ]

    def discriminator_loss(self, round: Round) -> dict[str, Tensor]:
        # Minus the estimated Wasserstein distance, up to the critic's Lipschitz constant.
        return {"wasserstein": round.fake.mean() - round.real.mean()}

    def generator_loss(self, round: Round) -> dict[str, Tensor]:
        return {"adversarial": -round.fake.mean()}

    def clip_critic(self) -> None:
        for weight in self.discriminator.parameters():
            weight.clamp_(-self.options.clip, self.options.clip)
