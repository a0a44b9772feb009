"""Deep convolutional GAN (Radford, Metz & Chintala 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gankernels import models
from gankernels.games import option
from gankernels.games.gan import GAN, GANOptions


@dataclass(frozen=True)
class DCGANOptions(GANOptions):
    width: int = option(64, "channels of the widest images, doubled with every halving")


class DCGAN(GAN):
    """Convolutional GAN: the DCGAN family at 32, 64, 128 px, else Dense-ConvT5 (28 px)."""

    Options = DCGANOptions
    channels_last = True

    def make_generator(self) -> nn.Module:
        network = models.DCGANGenerator if self.in_family else models.DenseConvGenerator
        return network(
            self.options.latent_dim,
            self.spec.channels,
            self.spec.size,
            num_classes=self.num_classes if self.conditional else 0,
            width=self.options.width,
        )

    def make_discriminator(self) -> nn.Module:
        network = models.DCGANDiscriminator if self.in_family else models.DenseConvDiscriminator
        return network(
            self.spec.channels,
            self.spec.size,
            num_classes=self.num_classes if self.conditional else 0,
            width=self.options.width,
        )

    @property
    def in_family(self) -> bool:
        """Whether the size is one the DCGAN family is made for: 32, 64, 128, ..."""
        size = self.spec.size
        return size >= 32 and size & (size - 1) == 0
