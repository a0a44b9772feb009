"""WGAN-GP's critic with BatchNorm in plain PyTorch, before and after `gk.fuse(critic)`.

Networks and data are those of dcgan.py; the penalty, written by hand, needs second derivatives.
(Batch norm lets samples see each other, which the paper advises against; many use it all the same.)
"""

import argparse
import copy
import time

import torch
from dcgan import blobs, discriminator, generator
from torch import nn

import gankernels as gk


def penalty(critic: nn.Module, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    alpha = torch.rand(len(real), 1, 1, 1)
    x = (alpha * real + (1 - alpha) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def train(G: nn.Module, critic: nn.Module, steps: int, batch: int) -> float:
    """Returns steps of the critic per second; the generator takes every fifth."""
    g_adam, c_adam = (torch.optim.Adam(m.parameters(), 1e-4, (0.0, 0.9)) for m in (G, critic))
    start = time.perf_counter()
    for step in range(steps):
        real, fake = blobs(batch), G(torch.randn(batch, 100, 1, 1)).detach()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake)
        c_adam.zero_grad()
        loss.backward()
        c_adam.step()
        if step % 5 == 0:
            g_adam.zero_grad()
            (-critic(G(torch.randn(batch, 100, 1, 1))).mean()).backward()
            g_adam.step()
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    arguments = parser.parse_args()
    G, critic = generator(arguments.width), discriminator(arguments.width)
    plain = copy.deepcopy((G, critic))
    gk.fuse(G), gk.fuse(critic)  # the one line
    for name, (g, c) in {"before": plain, "after": (G, critic)}.items():
        print(f"{name}: {train(g, c, arguments.steps, arguments.batch):.2f} it/s")


if __name__ == "__main__":
    main()
