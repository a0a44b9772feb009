"""Deep convolutional GAN (Radford, Metz & Chintala 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from gankernels import networks
from gankernels.games import BareOptions, option
from gankernels.games.gan import GAN, GANOptions


@dataclass(frozen=True)
class DCGANOptions(GANOptions):
    width: int = option(64, "channels at half the image size, doubled with every halving")
    dropout: float = option(0.3, "discriminator dropout (28 px networks only)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, got {self.dropout}")


class DCGAN(GAN):
    """Convolutional GAN: the DCGAN family at 32, 64, 128 px, else Dense-ConvT5 (28 px)."""

    Options: ClassVar[type[BareOptions]] = DCGANOptions
    options: DCGANOptions
    channels_last = True

    def make_generator(self) -> nn.Module:
        network = networks.DCGANGenerator if self.in_family else networks.DenseConvGenerator
        return network(
            self.options.latent_dim,
            self.spec.channels,
            self.spec.size,
            num_classes=self.num_classes if self.conditional else 0,
            width=self.options.width,
        )

    def make_discriminator(self) -> nn.Module:
        channels, size, width = self.spec.channels, self.spec.size, self.options.width
        classes = self.num_classes if self.conditional else 0
        if self.in_family:
            return networks.DCGANDiscriminator(channels, size, num_classes=classes, width=width)
        return networks.DenseConvDiscriminator(
            channels, size, num_classes=classes, width=width, dropout=self.options.dropout
        )

    @property
    def in_family(self) -> bool:
        """Whether the DCGAN family is defined for the size: 32, 64, 128, ..."""
        size = self.spec.size
        return size >= 32 and size & (size - 1) == 0
