"""Wasserstein GAN with weight clipping (Arjovsky, Chintala & Bottou 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from gankernels.games import AdversarialOptions, BareOptions, Player, option
from gankernels.games._wasserstein import Wasserstein


@dataclass(frozen=True)
class WGANOptions(AdversarialOptions):
    lr: float = option(5e-5, "learning rate of the generator")
    d_lr: float = option(5e-5, "learning rate of the critic")
    n_critic: int = option(5, "critic steps per generator step")
    clip: float = option(0.01, "the critic's weights stay in [-clip, clip]")


class WGAN(Wasserstein):
    """Dense Wasserstein GAN: weight clipping, RMSprop, several critic steps per generator step."""

    Options: ClassVar[type[BareOptions]] = WGANOptions
    options: WGANOptions

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

    def clip_critic(self) -> None:
        for weight in self.discriminator.parameters():
            weight.clamp_(-self.options.clip, self.options.clip)
