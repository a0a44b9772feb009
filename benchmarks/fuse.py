"""What `gk.fuse(network)` brings to networks as others write them: before against after.

``python benchmarks/fuse.py`` prints the table and ``--save NAME`` writes results/. "Forward +
backward" is one pass and the gradients of all parameters; "penalty step" is what a WGAN-GP critic
does: two passes, a gradient penalty written by hand in PyTorch, backward and Adam. How much of the
time goes into convolutions, which stay as they are, decides the ratio.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from gradient_penalty import critic_step, eager_penalty
from harness import interleaved, prepare, save
from networks import DCGAN, ResNet, StyleGAN, UNet
from torch import Tensor, nn

import gankernels as gk

NETWORKS = {
    "DCGAN": lambda: DCGAN(32),
    "U-Net": lambda: UNet(16),
    "ResNet": lambda: ResNet(32),
    "StyleGAN": lambda: StyleGAN(16),
}


def forward_backward(network: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        network(x).mean().backward()
        network.zero_grad()

    return run


def steps(network: nn.Module, what: str, batch: int, size: int) -> Callable[[], object]:
    x = torch.rand(batch, 3, size, size) * 2 - 1
    if what == "forward + backward":
        return forward_backward(network, x)
    return critic_step(network, eager_penalty, x, x.flip(0) * 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="per case")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--lone", action="store_true", help="fuse BatchNorms alone too")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(
        f"{'network':10} {'what':20} {'fused':>5} {'before ms':>10} {'after ms':>10}  times faster"
    )
    for name, make in NETWORKS.items():
        if arguments.only not in name:
            continue
        for what in ("forward + backward", "penalty step"):
            torch.manual_seed(0)
            before = make()
            lines: list[str] = []
            after = gk.fuse(copy.deepcopy(before), lone=arguments.lone, report=lines.append)
            fused = sum(line.startswith("fused") for line in lines)
            times = interleaved(
                {
                    "before": steps(before, what, arguments.batch, arguments.size),
                    "after": steps(after, what, arguments.batch, arguments.size),
                },
                seconds=arguments.seconds,
                least=3,
            )
            ratio = times["before"] / times["after"]
            print(
                f"{name:10} {what:20} {fused:5} {1e3 * times['before']:10.1f} "
                f"{1e3 * times['after']:10.1f}  {ratio:12.2f}",
                flush=True,
            )
            rows.append(
                {"network": name, "what": what, "fused": fused, "seconds": times, "ratio": ratio}
            )
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
