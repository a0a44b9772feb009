"""Networks only: what they compute, never how they are trained.

Generators map noise `(N, latent_dim)` to images `(N, channels, size, size)` in [-1, 1];
discriminators map such images to logits `(N,)`. All of them take labels `(N,)` as a second
argument, which the unconditional ones refuse.
"""

from gankernels.models.dcgan import (
    DCGANDiscriminator,
    DCGANGenerator,
    DenseConvDiscriminator,
    DenseConvGenerator,
)
from gankernels.models.mlp import (
    EmbeddingMLPDiscriminator,
    EmbeddingMLPGenerator,
    MLPDiscriminator,
    MLPGenerator,
)

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DenseConvDiscriminator",
    "DenseConvGenerator",
    "EmbeddingMLPDiscriminator",
    "EmbeddingMLPGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
]
