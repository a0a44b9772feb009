"""The classic dense conditional GAN (Mirza & Osindero 2014), label embeddings as factors."""

from __future__ import annotations

from torch import nn

from gankernels import networks
from gankernels.games.gan import GAN


class CGAN(GAN):
    """Dense conditional GAN: label embeddings multiply the noise and the flattened image."""

    given = ("labels",)

    def make_generator(self) -> nn.Module:
        return networks.EmbeddingMLPGenerator(
            self.options.latent_dim, self.spec.image_shape, self.num_classes
        )

    def make_discriminator(self) -> nn.Module:
        return networks.EmbeddingMLPDiscriminator(self.spec.image_shape, self.num_classes)
