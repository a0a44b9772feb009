"""Dense networks: the MLPs of the first GANs, and the conditional pair with label embeddings."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor, nn

from gankernels.networks._init import init_glorot
from gankernels.networks._labels import check_labels
from gankernels.nn import BatchNormLeakyReLU1d, LeakyReLUBatchNorm1d
from gankernels.nn.cpu import BitDropout, OneDNNLinear

SLOPE = 0.2
# In Keras momentum is the share of the old statistics that is kept (0.8), in PyTorch the rest.
BN_MOMENTUM = 0.2


class MLPGenerator(nn.Module):
    """Dense generator: 128-L, then 256, 512 and 1024 with batch norm and L, then tanh."""

    def __init__(
        self,
        latent_dim: int,
        image_shape: tuple[int, int, int],
        widths: tuple[int, ...] = (128, 256, 512, 1024),
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        layers = [OneDNNLinear(latent_dim, widths[0]), nn.LeakyReLU(SLOPE)]
        for before, width in pairwise(widths):
            layers += [
                OneDNNLinear(before, width),
                BatchNormLeakyReLU1d(width, negative_slope=SLOPE, momentum=BN_MOMENTUM),
            ]
        layers += [OneDNNLinear(widths[-1], prod(image_shape)), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, 0)
        return self.layers(noise).reshape(-1, *self.image_shape)


class MLPDiscriminator(nn.Module):
    """Dense discriminator or critic: 512-L, 256-L, one logit. No norm, as a critic needs."""

    per_sample = True

    def __init__(
        self, image_shape: tuple[int, int, int], widths: tuple[int, ...] = (512, 256)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in pairwise((prod(image_shape), *widths)):
            layers += [OneDNNLinear(before, width), nn.LeakyReLU(SLOPE)]
        self.features = nn.Sequential(*layers)
        self.head = OneDNNLinear(widths[-1], 1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, 0)
        return self.head(self.features(images.flatten(1))).flatten()


class EmbeddingMLPGenerator(nn.Module):
    """The classic conditional dense generator: noise times a label embedding.

    256, 512 and 1024 units, each L and then batch norm (in that order), then tanh.
    """

    def __init__(
        self,
        latent_dim: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: tuple[int, ...] = (256, 512, 1024),
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes, latent_dim)
        layers: list[nn.Module] = []
        for before, width in pairwise((latent_dim, *widths)):
            layers += [
                OneDNNLinear(before, width),
                LeakyReLUBatchNorm1d(width, negative_slope=SLOPE, momentum=BN_MOMENTUM),
            ]
        layers += [OneDNNLinear(widths[-1], prod(image_shape)), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(init_glorot)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, self.num_classes)
        return self.layers(noise * self.embedding(labels)).reshape(-1, *self.image_shape)


class EmbeddingMLPDiscriminator(nn.Module):
    """The classic conditional dense discriminator: the flattened image times a label embedding.

    512-L, 512-L-dropout, 512-L-dropout, one logit.
    """

    per_sample = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        width: int = 512,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes, prod(image_shape))
        self.features = nn.Sequential(
            OneDNNLinear(prod(image_shape), width),
            nn.LeakyReLU(SLOPE),
            OneDNNLinear(width, width),
            nn.LeakyReLU(SLOPE),
            BitDropout(dropout),
            OneDNNLinear(width, width),
            nn.LeakyReLU(SLOPE),
            BitDropout(dropout),
        )
        self.head = OneDNNLinear(width, 1)
        self.apply(init_glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, self.num_classes)
        return self.head(self.features(images.flatten(1) * self.embedding(labels))).flatten()
