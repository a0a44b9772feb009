"""Wasserstein GAN with weight clipping (Arjovsky, Chintala & Bottou 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gankernels import models
from gankernels.games import Batch, Game, Options, Player, option


@dataclass(frozen=True)
class WGANOptions(Options):
    lr: float = option(5e-5, "learning rate of the generator")
    d_lr: float = option(5e-5, "learning rate of the critic")
    n_critic: int = option(5, "critic steps per generator step")
    clip: float = option(0.01, "the critic's weights stay in [-clip, clip]")


class WGAN(Game):
    """Dense Wasserstein GAN: weight clipping, RMSprop, several critic steps per generator step."""

    Options = WGANOptions

    def __init__(self, spec, options=None) -> None:
        super().__init__(spec, options)
        self.generator = models.MLPGenerator(self.options.latent_dim, spec.image_shape)
        self.critic = models.MLPDiscriminator(spec.image_shape)

    def players(self) -> list[Player]:
        return [
            Player(
                "critic",
                self.critic,
                self.critic_loss,
                partial(torch.optim.RMSprop, lr=self.options.d_lr),
                steps=self.options.n_critic,
                after_step=self.clip_critic,
            ),
            Player(
                "generator",
                self.generator,
                self.generator_loss,
                partial(torch.optim.RMSprop, lr=self.options.lr),
            ),
        ]

    def critic_loss(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        real = self.critic(batch.images)
        fake = self.critic(self.fake(batch.labels, rng))
        # Minus the estimated Wasserstein distance, up to the critic's Lipschitz constant.
        return {"wasserstein": fake.float().mean() - real.float().mean()}

    def generator_loss(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        return {"adversarial": -self.critic(self.fake(batch.labels, rng)).float().mean()}

    def clip_critic(self) -> None:
        for weight in self.critic.parameters():
            weight.clamp_(-self.options.clip, self.options.clip)
