"""Gradient penalties against eager PyTorch: the reduction alone, and whole critic steps.

``python benchmarks/gradient_penalty.py`` prints the table and ``--save NAME`` writes results/. The
eager side is what GAN code writes by hand, with the same networks and the same optimizer. The
table also has the ratio to a yardstick: for the reduction, three times the time to read the tensor
once (for forward, backward and double backward); for the critic with batch norm, the same step of
the same critic without norm.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from script import medians, prepare, save
from torch import Tensor, nn

import gankernels as gk

SLOPE = 0.2


@dataclass(frozen=True)
class Comparison:
    name: str
    contenders: Callable[[], dict[str, Callable[[], object]]]
    bar: float = 0  # the least speed-up over eager, or 0
    limit: float = 0  # the largest ratio to the yardstick, or 0


def eager_norm_penalty(grad: Tensor) -> Tensor:
    return (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def eager_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    alpha = torch.rand(len(real), *(1,) * (real.dim() - 1))
    x = (alpha * real + (1 - alpha) * fake).requires_grad_()
    out = critic(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    return eager_norm_penalty(grad)


def reduction(*shape: int) -> dict[str, Callable[[], object]]:
    """The penalty of a gradient, through its second derivative."""
    grad = torch.randn(shape).mul_(2 / torch.Size(shape[1:]).numel() ** 0.5)
    tangent = torch.randn(shape)
    leaf = grad.clone().requires_grad_()

    def run(penalty: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(penalty(leaf), leaf, create_graph=True)
        return torch.autograd.grad(first, leaf, tangent)[0]

    return {
        "yardstick": lambda: [grad.sum() for _ in range(3)],
        "eager": lambda: run(eager_norm_penalty),
        "ours": lambda: run(gk.functional.gradient_norm_penalty),
    }


def critic_step(critic: nn.Module, penalty: Callable, real: Tensor, fake: Tensor) -> Callable:
    """Returns a step of a WGAN-GP critic: both losses, the penalty, backward, Adam."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.5, 0.9), fused=True)

    def run() -> None:
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def compare_steps(make: Callable[[], nn.Module], *shape: int) -> dict[str, Callable[[], object]]:
    critic = make()
    real, fake = torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1
    return {
        "eager": critic_step(copy.deepcopy(critic), eager_penalty, real, fake),
        "ours": critic_step(critic, gk.functional.gradient_penalty, real, fake),
    }


def mlp() -> nn.Module:
    """PyTorch-GAN's critic for MNIST."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512), nn.LeakyReLU(SLOPE),
        nn.Linear(512, 256), nn.LeakyReLU(SLOPE),
        nn.Linear(256, 1),
    )  # fmt: skip


def conv() -> nn.Module:
    """The DCGAN discriminator for 64 px, without norm."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 256), (256, 512)):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4))


def normalized() -> dict[str, Callable[[], object]]:
    """A penalty and its gradient for a dense critic, 3 x 1024, whose layers are normalized."""
    real, fake = torch.rand(256, 784) * 2 - 1, torch.rand(256, 784) * 2 - 1

    def critic(*between: Callable[[], nn.Module]) -> nn.Module:
        layers: list[nn.Module] = []
        for before in (784, 1024, 1024):
            layers += [nn.Linear(before, 1024), *(make() for make in between)]
        return nn.Sequential(*layers, nn.Linear(1024, 1))

    def step(critic: nn.Module, penalty: Callable) -> Callable[[], object]:
        def run() -> None:
            critic.zero_grad()
            penalty(critic, real, fake).backward()

        return run

    def activation() -> nn.Module:
        return nn.LeakyReLU(SLOPE)

    ours = gk.functional.gradient_penalty
    return {
        "yardstick": step(critic(activation), ours),
        "eager": step(critic(lambda: nn.BatchNorm1d(1024), activation), eager_penalty),
        "ours": step(critic(lambda: gk.nn.BatchNormLeakyReLU1d(1024)), ours),
    }


def cases() -> Iterator[Comparison]:
    for shape, limit in (((64, 784), 0), ((64, 3, 64, 64), 0), ((256, 3, 128, 128), 2)):
        name = f"reduction {'x'.join(map(str, shape))}"
        yield Comparison(name, lambda shape=shape: reduction(*shape), bar=4, limit=limit)
    yield Comparison("critic step, dense, 64x784", lambda: compare_steps(mlp, 64, 1, 28, 28))
    yield Comparison("critic step, conv, 16x3x64x64", lambda: compare_steps(conv, 16, 3, 64, 64))
    yield Comparison("penalty, 3 x 1024 with batch norm, batch 256", normalized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="seconds per case")
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(f"{'case':46} {'eager ms':>9} {'ours ms':>9}  x eager (bar)  x yardstick (limit)")
    for case in cases():
        if arguments.only not in case.name:
            continue
        torch.manual_seed(0)
        times = medians(case.contenders(), seconds=arguments.seconds)
        ratio = times["eager"] / times["ours"]
        line = (
            f"{case.name:46} {1e3 * times['eager']:9.3f} {1e3 * times['ours']:9.3f}  {ratio:7.2f}"
        )
        line += f" ({case.bar}){' ' if ratio >= case.bar else '!'}" if case.bar else " " * 5
        if "yardstick" in times:
            taken = times["ours"] / times["yardstick"]
            line += f"  {taken:11.2f}"
            if case.limit:
                line += f" ({case.limit}){' ' if taken <= case.limit else '!'}"
        print(line, flush=True)
        rows.append(
            {
                "case": case.name, "bar": case.bar, "limit": case.limit, "seconds": times,
                "times_eager": ratio,
            }
        )  # fmt: skip
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
