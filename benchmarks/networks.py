"""Typical networks in plain PyTorch, to be fused by `gk.fuse`.

`PAIRS` is how many a network of the default depth has of a BatchNorm and a LeakyReLU or ReLU, both
of them modules, one right after the other: counted by hand, for `gk.fuse` to find as many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DCGAN(nn.Module):
    """The discriminator of PyTorch's DCGAN example, from `size` pixels to one number."""

    PAIRS = 3  # where 32, 16 and 8 pixels are left; the first and the last layer have no norm

    def __init__(self, width: int = 64, size: int = 64, gpus: int = 1) -> None:
        super().__init__()
        self.gpus = gpus
        layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        while size > 8:
            layers += [
                nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width, size = width * 2, size // 2
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 0, bias=False))

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and self.gpus > 1:
            output = nn.parallel.data_parallel(self.main, input, range(self.gpus))
        else:
            output = self.main(input)
        return output.view(-1, 1).squeeze(1)


class Down(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Up(nn.Module):
    """Activation, then norm; the output of a second norm goes into the skip connection."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(before, after, 4, 2, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.norm1(self.act1(self.conv1(x)))
        x = self.norm2(self.conv2(x))
        return x if skip is None else torch.cat([x, skip], 1)


class UNet(nn.Module):
    """A discriminator that judges every pixel; its pairs are attributes that forward calls."""

    PAIRS = 4  # one in each Down, one in each Up, whose second norm has no activation

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.down1, self.down2 = Down(width, width * 2), Down(width * 2, width * 4)
        self.up1, self.up2 = Up(width * 4, width * 2), Up(width * 4, width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2)
        half = self.down1(x)
        return self.last(self.up2(self.up1(self.down2(half), half)))


class Residual(nn.Module):
    """BN-ReLU-conv, twice, and a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.ReLU(),
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
            nn.AvgPool2d(2),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1), nn.AvgPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class ResNet(nn.Module):
    """The critic of a ResNet GAN; its last norm is followed by a function."""

    PAIRS = 6  # two in each of three blocks

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, width) for _ in range(blocks))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)).sum((2, 3)))


class EqualConv(nn.Conv2d):
    """With the learning rate equalized by a factor on the weight."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.in_channels * self.kernel_size[0] ** 2) ** -0.5
        return F.conv2d(x, self.weight * scale, self.bias, self.stride, self.padding)


class StyleGAN(nn.Module):
    """A StyleGAN-like critic: residual blocks, minibatch standard deviation, no norm."""

    PAIRS = 0

    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(EqualConv(3, width, 1), nn.LeakyReLU(0.2))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                EqualConv(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                EqualConv(width, width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
            )
            for _ in range(blocks)
        )
        self.last = EqualConv(width + 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (block(x) + F.avg_pool2d(x, 2)) / 2**0.5
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        return self.last(torch.cat([x, deviation], 1)).mean((1, 2, 3))
