"""Networks of generators and discriminators, without their training.

Generators map noise `(N, latent_dim)` to images `(N, channels, size, size)` in [-1, 1];
discriminators map such images to logits `(N,)`. All of them take labels `(N,)` as a second
argument, which the unconditional ones refuse. A discriminator sets `per_sample = True` if its
output for an image does not depend on the others of the batch: it can then process real and
generated images in one call.
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
