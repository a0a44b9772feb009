"""Convolutional networks: the Dense-ConvT5 pair for small images, the DCGAN family for others.

Every network can be conditional: with `num_classes > 0` one-hot labels are joined to the noise of
a generator and, as constant planes, to the image of a discriminator.
"""

from __future__ import annotations

from torch import Tensor, nn

from gankernels.networks._init import init_glorot
from gankernels.networks._labels import join_one_hot
from gankernels.nn import BatchNormLeakyReLU1d, BatchNormLeakyReLU2d
from gankernels.nn.cpu import BitDropout, ConvToOneChannel2d, OneDNNLinear

SLOPE = 0.2


def init_dcgan(module: nn.Module) -> None:
    """Normal(0, 0.02) convolutions and Normal(1, 0.02) norm scales (Radford et al. 2016)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNormLeakyReLU2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DenseConvGenerator(nn.Module):
    """Dense to (4 width, size/4, size/4), then 5x5 transposed convolutions; 28 px as designed.

    Dense-BN-L, ConvT5 2 width stride 1-BN-L, ConvT5 width stride 2-BN-L, ConvT5 stride 2-tanh,
    all without bias. `size` must be divisible by 4.
    """

    def __init__(
        self, latent_dim: int, channels: int, size: int, num_classes: int = 0, width: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.start = (4 * width, check_quarters(size), size // 4)
        units = 4 * width * (size // 4) ** 2
        self.dense = nn.Sequential(
            OneDNNLinear(latent_dim + num_classes, units, bias=False),
            BatchNormLeakyReLU1d(units, negative_slope=SLOPE),
        )
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 5, stride=1, padding=2, bias=False),
            BatchNormLeakyReLU2d(2 * width, negative_slope=SLOPE),
            _double(2 * width, width),
            BatchNormLeakyReLU2d(width, negative_slope=SLOPE),
            _double(width, channels),
            nn.Tanh(),
        )
        self.apply(init_glorot)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.dense(join_one_hot(noise, labels, self.num_classes))
        return self.layers(x.reshape(-1, *self.start))


class DenseConvDiscriminator(nn.Module):
    """Conv5 width stride 2-L-dropout, Conv5 2 width stride 2-L-dropout, one logit. No norm."""

    per_sample = True

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int = 0,
        width: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        check_quarters(size)
        self.features = nn.Sequential(
            nn.Conv2d(channels + num_classes, width, 5, stride=2, padding=2),
            nn.LeakyReLU(SLOPE),
            BitDropout(dropout),
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
            nn.LeakyReLU(SLOPE),
            BitDropout(dropout),
            nn.Flatten(),
        )
        self.head = OneDNNLinear(2 * width * (size // 4) ** 2, 1)
        self.apply(init_glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(join_one_hot(images, labels, self.num_classes))).flatten()


class DCGANGenerator(nn.Module):
    """The DCGAN generator for 32, 64, 128, ... px: ConvT4 from 1x1 up, BN-ReLU between, tanh.

    `width` is the number of channels before the last layer and doubles towards the noise.
    """

    def __init__(
        self, latent_dim: int, channels: int, size: int, num_classes: int = 0, width: int = 64
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        channels_in = width * check_power_of_two(size) // 8
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim + num_classes, channels_in, 4, bias=False),
            BatchNormLeakyReLU2d(channels_in, negative_slope=0.0),
        ]
        while channels_in > width:
            layers += [
                nn.ConvTranspose2d(channels_in, channels_in // 2, 4, 2, 1, bias=False),
                BatchNormLeakyReLU2d(channels_in // 2, negative_slope=0.0),
            ]
            channels_in //= 2
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(init_dcgan)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(join_one_hot(noise, labels, self.num_classes)[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """The DCGAN discriminator for 32, 64, 128, ... px: Conv4 stride 2, BN-L except first."""

    def __init__(self, channels: int, size: int, num_classes: int = 0, width: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        last = width * check_power_of_two(size) // 8
        layers: list[nn.Module] = [
            nn.Conv2d(channels + num_classes, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(SLOPE),
        ]
        while width < last:
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
                BatchNormLeakyReLU2d(2 * width, negative_slope=SLOPE),
            ]
            width *= 2
        self.features = nn.Sequential(*layers)
        self.head = ConvToOneChannel2d(last, 4, bias=False)
        self.apply(init_dcgan)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.features(join_one_hot(images, labels, self.num_classes))).flatten()


def check_quarters(size: int) -> int:
    """A quarter of `size`; ValueError unless that is a positive whole number."""
    if size < 4 or size % 4:
        raise ValueError(f"size must be divisible by 4, got {size}")
    return size // 4


def check_power_of_two(size: int) -> int:
    """`size` itself; ValueError unless it is a power of two of at least 16."""
    if size < 16 or size & (size - 1):
        raise ValueError(f"size must be a power of two of at least 16, got {size}")
    return size


def _double(channels_in: int, channels_out: int) -> nn.ConvTranspose2d:
    """A 5x5 transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(
        channels_in, channels_out, 5, stride=2, padding=2, output_padding=1, bias=False
    )
