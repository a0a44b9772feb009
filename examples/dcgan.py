"""A 64 px DCGAN in plain PyTorch, before and after the one line that gankernels asks for.

Data is random blobs, so that it runs anywhere: ``python examples/dcgan.py --steps 20``.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

import gankernels as gk


def generator(width: int) -> nn.Module:
    layers, channels = [], 100
    for i, after in enumerate((8 * width, 4 * width, 2 * width, width)):
        conv = nn.ConvTranspose2d(channels, after, 4, 2 if i else 1, 1 if i else 0, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        channels = after
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


def discriminator(width: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    for before in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(before, 2 * before, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * before),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4), nn.Flatten(0))


def blobs(n: int) -> torch.Tensor:
    return F.interpolate(torch.rand(n, 3, 4, 4) * 2 - 1, size=64, mode="bilinear")


def train(G: nn.Module, D: nn.Module, steps: int, batch: int) -> float:
    """Returns iterations per second."""
    g_adam, d_adam = (torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (G, D))
    start = time.perf_counter()
    for _ in range(steps):
        real, fake = blobs(batch), G(torch.randn(batch, 100, 1, 1))
        d_loss = F.softplus(-D(real)).mean() + F.softplus(D(fake.detach())).mean()
        d_adam.zero_grad()
        d_loss.backward()
        d_adam.step()
        g_loss = F.softplus(-D(fake)).mean()
        g_adam.zero_grad()
        g_loss.backward()
        g_adam.step()
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    arguments = parser.parse_args()
    G, D = generator(arguments.width), discriminator(arguments.width)
    plain = copy.deepcopy((G, D))
    gk.fuse(G), gk.fuse(D)  # the one line
    for name, (g, d) in {"before": plain, "after": (G, D)}.items():
        print(f"{name}: {train(g, d, arguments.steps, arguments.batch):.2f} it/s")


if __name__ == "__main__":
    main()
