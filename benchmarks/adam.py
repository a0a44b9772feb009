"""Measures steps of `gk.optim.Adam` on CPU against `torch.optim.Adam`.

``python benchmarks/adam.py`` prints the table, ``--save adam`` writes results/. The networks are
those of the training benchmark's generators and one of many small layers. "Half" has gradients in
bfloat16 and writes a bfloat16 copy of the matrices: PyTorch has to convert both in separate passes.
A step of n parameters reads 16 n bytes and writes 12 n, with half gradients and copies 14 n and
14 n; the lower bound is the time of a clone that moves as many.
"""

from __future__ import annotations

from collections.abc import Callable

import pytorch_gan
import torch
from script import arguments_of, medians, save
from torch import nn

from gankernels.optim import Adam

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cgan's generator": pytorch_gan.CGAN.make_generator,
    "dcgan's generator": pytorch_gan.DCGAN.make_generator,
    "64 layers of 16": lambda: nn.Sequential(*(nn.Linear(16, 16) for _ in range(64))),
    "4096 x 4096": lambda: nn.Linear(4096, 4096),
}
OPTIONS = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True}


def theirs(network: nn.Module, half: bool) -> Callable[[], object]:
    optimizer = torch.optim.Adam(network.parameters(), **OPTIONS)
    gradients = {p: torch.randn_like(p) for p in network.parameters()}
    if half:
        gradients = {p: g.bfloat16() if p.dim() > 1 else g for p, g in gradients.items()}

    def step() -> None:
        for p, g in gradients.items():
            p.grad = g.float()  # the tensor itself if it is float32
        optimizer.step()
        if half:
            for p in gradients:
                if p.dim() > 1:
                    p.detach().bfloat16()

    return step


def ours(network: nn.Module, half: bool) -> Callable[[], object]:
    optimizer = Adam(network.parameters(), **OPTIONS)
    copied = [p for p in network.parameters() if half and p.dim() > 1]
    optimizer.copies = {p: p.detach().bfloat16() for p in copied}
    optimizer.half_gradients = {}
    gradients = {p: torch.randn_like(p) for p in network.parameters()}
    halves = {p: gradients.pop(p).bfloat16() for p in copied}
    for p, g in gradients.items():
        p.grad = g

    def step() -> None:
        optimizer.half_gradients |= halves
        optimizer.step()

    return step


def main() -> None:
    arguments = arguments_of(__doc__)
    rows = []
    print(f"{'network':18} {'':4} {'parameters':>10} {'us':>8} {'x floor':>8} {'x faster':>9}")
    for name, make in NETWORKS.items():
        for half in (False, True):
            torch.manual_seed(0)
            count = sum(p.numel() for p in make().parameters())
            moved = torch.empty(28 * count // 2, dtype=torch.uint8)  # a clone moves it twice
            times = medians(
                {"theirs": theirs(make(), half), "ours": ours(make(), half), "clone": moved.clone},
                seconds=arguments.seconds,
            )
            row = {
                "network": name,
                "half": half,
                "parameters": count,
                "us": 1e6 * times["ours"],
                "floors": times["ours"] / times["clone"],
                "speedup": times["theirs"] / times["ours"],
            }
            print(
                f"{name:18} {'half' if half else '':4} {count:10} {row['us']:8.1f} "
                f"{row['floors']:8.2f} {row['speedup']:9.2f}"
            )
            rows.append(row)
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
