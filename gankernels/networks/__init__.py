"""Networks only: what they compute, never how they are trained.

Generators map noise `(N, latent_dim)` to images `(N, channels, size, size)` in [-1, 1];
discriminators map such images to logits `(N,)`. All of them take labels `(N,)` as a second
argument, which the unconditional ones refuse. A discriminator says `per_sample = True` where what
it makes of an image depends on no other of the batch: it can then judge real and generated images
in one go.
"""

from gankernels.networks._batch_statistics import with_batch_statistics
from gankernels.networks.dcgan import (
    DCGANDiscriminator,
    DCGANGenerator,
    DenseConvDiscriminator,
    DenseConvGenerator,
)
from gankernels.networks.mlp import (
    EmbeddingMLPDiscriminator,
    EmbeddingMLPGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from gankernels.networks.wgan_gp import ConvCritic, DeconvGenerator

__all__ = [
    "ConvCritic",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DeconvGenerator",
    "DenseConvDiscriminator",
    "DenseConvGenerator",
    "EmbeddingMLPDiscriminator",
    "EmbeddingMLPGenerator",
    "MLPDiscriminator",
    "MLPGenerator",
    "with_batch_statistics",
]
