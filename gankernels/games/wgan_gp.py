"""Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from gankernels import networks, optim
from gankernels.games import AdversarialOptions, BareOptions, Player, option
from gankernels.games._wasserstein import Wasserstein

NETWORKS = ("dense", "conv")


@dataclass(frozen=True)
class WGANGPOptions(AdversarialOptions):
    lr: float = option(1e-4, "learning rate of the generator")
    d_lr: float = option(1e-4, "learning rate of the critic")
    beta1: float = option(0.5, "Adam's beta1")
    beta2: float = option(0.9, "Adam's beta2")
    n_critic: int = option(5, "critic steps per generator step")
    penalty: str | None = option("wgan-gp", "penalty on the critic's gradient")
    networks: str = option("dense", "dense: as in wgan; conv: as in the paper for MNIST")
    width: int = option(64, "channels at half the image size (conv networks only)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.networks not in NETWORKS:
            raise ValueError(f"networks must be {' or '.join(NETWORKS)}, got {self.networks!r}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class WGANGP(Wasserstein):
    """Wasserstein GAN with gradient penalty, dense or convolutional; no norm in the critic."""

    Options: ClassVar[type[BareOptions]] = WGANGPOptions
    options: WGANGPOptions

    @property
    def channels_last(self) -> bool:
        return self.options.networks == "conv"

    def make_generator(self) -> nn.Module:
        if self.options.networks == "dense":
            return super().make_generator()
        return networks.DeconvGenerator(
            self.options.latent_dim, self.spec.channels, self.spec.size, self.options.width
        )

    def make_discriminator(self) -> nn.Module:
        if self.options.networks == "dense":
            return super().make_discriminator()
        return networks.ConvCritic(self.spec.channels, self.spec.size, self.options.width)

    def players(self) -> list[Player]:
        adam = partial(optim.Adam, betas=(self.options.beta1, self.options.beta2))
        return [
            self.discriminator_player(
                partial(adam, lr=self.options.d_lr), name="critic", steps=self.options.n_critic
            ),
            self.generator_player(partial(adam, lr=self.options.lr)),
        ]
