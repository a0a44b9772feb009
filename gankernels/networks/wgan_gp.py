"""The convolutional networks of WGAN-GP for MNIST (Gulrajani et al. 2017), without any norm."""

from __future__ import annotations

from torch import Tensor, nn

from gankernels.networks._init import init_glorot
from gankernels.networks._labels import check_labels
from gankernels.networks.dcgan import check_quarters
from gankernels.nn.cpu import OneDNNLinear

SLOPE = 0.2


class DeconvGenerator(nn.Module):
    """Dense to (4 width, 4, 4), then 5x5 transposed convolutions with ReLU to 28 px, tanh.

    In between the image is 7 px wide: 8 px without a row and a column. Other sizes divisible by 4
    work the same way.
    """

    def __init__(self, latent_dim: int, channels: int, size: int, width: int = 64) -> None:
        super().__init__()
        quarter = check_quarters(size)
        eighth = (quarter + 1) // 2
        self.start = (4 * width, eighth, eighth)
        self.dense = nn.Sequential(OneDNNLinear(latent_dim, 4 * width * eighth**2), nn.ReLU())
        self.layers = nn.Sequential(
            _double(4 * width, 2 * width, cut=2 * eighth - quarter),
            nn.ReLU(),
            _double(2 * width, width),
            nn.ReLU(),
            _double(width, channels),
            nn.Tanh(),
        )
        self.apply(init_glorot)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, 0)
        return self.layers(self.dense(noise).reshape(-1, *self.start))


class ConvCritic(nn.Module):
    """Conv5 stride 2 to width, 2 width, 4 width, each L; then one number. `size` as above."""

    per_sample = True

    def __init__(self, channels: int, size: int, width: int = 64) -> None:
        super().__init__()
        eighth = (check_quarters(size) + 1) // 2
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, stride=2, padding=2),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
        )
        self.head = OneDNNLinear(4 * width * eighth**2, 1)
        self.apply(init_glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        check_labels(labels, 0)
        return self.head(self.features(images)).flatten()


def _double(channels_in: int, channels_out: int, cut: int = 0) -> nn.ConvTranspose2d:
    """A 5x5 transposed convolution to twice the height and width, less `cut` (0 or 1)."""
    return nn.ConvTranspose2d(
        channels_in, channels_out, 5, stride=2, padding=2, output_padding=1 - cut
    )
