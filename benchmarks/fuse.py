"""Compares typical networks before and after `gk.fuse(network)`: results and speed.

``python benchmarks/fuse.py`` prints a table, ``--save NAME`` writes results/ as well and ``--save
fuse`` also the table of docs/migrating.md. A row has the number of pairs that were found; the
differences of outputs, gradients and second derivatives in float64 from those of the original
network; and the speed-up in float32. "Forward + backward" is one pass and the gradients of all
parameters; "penalty step" is a step of a WGAN-GP critic: two passes, a gradient penalty written by
hand in PyTorch, backward and Adam. The ratio depends on the share of the convolutions, which are
not changed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from gradient_penalty import critic_step, eager_norm_penalty, eager_penalty
from networks import DCGAN, ResNet, StyleGAN, UNet
from script import medians, prepare, save
from torch import Tensor, nn

import gankernels as gk

NETWORKS = {
    "DCGAN": lambda: DCGAN(32),
    "U-Net": lambda: UNet(16),
    "ResNet": lambda: ResNet(32),
    "StyleGAN": lambda: StyleGAN(16),
}
TIMED = ("forward + backward", "penalty step")
PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
BEGIN, END = "<!-- table: python benchmarks/fuse.py --save fuse -->\n", "<!-- end -->\n"
HEAD = (
    "| network | pairs | output | gradients | second derivatives | forward + backward "
    "| penalty step |\n|---|---|---|---|---|---|---|\n"
)


def differences(before: nn.Module, after: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the differences between two networks in float64: of the output, of the gradients of
    its square with respect to input and parameters, and of those of a penalty on the input's
    gradient.

    The difference of a tensor is the largest of its elements, relative to its largest value, or to
    a thousandth of the largest gradient if that is more, since the gradient of a bias in front of a
    norm consists of rounding errors.
    """

    def visible(network: nn.Module) -> dict[str, list[Tensor]]:
        network, leaf = copy.deepcopy(network).double(), x.double().requires_grad_()
        weights = list(network.parameters())
        out = network(leaf)
        # Squared, since the sum of the outputs of a norm does not depend on the input.
        first = torch.autograd.grad(out.square().sum(), [leaf, *weights], create_graph=True)
        second = torch.autograd.grad(
            eager_norm_penalty(first[0]), weights, allow_unused=True, materialize_grads=True
        )
        return {"output": [out], "gradients": [*first], "second derivatives": [*second]}

    found, expected = visible(after), visible(before)
    worst = {}
    for what, tensors in expected.items():
        sizes = [t.abs().max().item() for t in tensors]
        apart = [(f - t).abs().max().item() for f, t in zip(found[what], tensors, strict=True)]
        least = 1e-3 * max(sizes)
        worst[what] = max(a / max(size, least) for a, size in zip(apart, sizes, strict=True))
    return worst


def forward_backward(network: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> None:
        network(x).mean().backward()
        network.zero_grad()

    return run


def steps(network: nn.Module, what: str, x: Tensor) -> Callable[[], object]:
    if what == "forward + backward":
        return forward_backward(network, x)
    return critic_step(network, eager_penalty, x, x.flip(0) * 0.9)


def measure(name: str, batch: int, size: int, seconds: float, lone: bool) -> dict:
    """Measures a network and returns its row for results/."""
    torch.manual_seed(0)
    before = NETWORKS[name]()
    x = torch.rand(batch, 3, size, size) * 2 - 1
    lines: list[str] = []
    after = gk.fuse(copy.deepcopy(before), lone=lone, log=lines.append)
    row = {
        "network": name,
        "pairs": before.PAIRS,
        "fused": sum(line.startswith("fused") for line in lines),
        "differences": differences(before, after, x),
        "seconds": {},
        "times_faster": {},
    }
    for what in TIMED:
        pair = {
            "before": steps(copy.deepcopy(before), what, x),
            "after": steps(copy.deepcopy(after), what, x),
        }
        times = medians(pair, seconds=seconds, least=3)
        row["seconds"][what] = times
        row["times_faster"][what] = times["before"] / times["after"]
    return row


def line(row: dict) -> str:
    """Formats a row for the printed table."""
    cells = [row["network"], f"{row['fused']} of {row['pairs']}"]
    cells += [f"{value:.0e}" if value else "0" for value in row["differences"].values()]
    cells += [f"{row['times_faster'][what]:.2f}x" for what in TIMED]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="seconds per case")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument(
        "--lone", action="store_true", help="also fuse BatchNorms without an activation"
    )
    parser.add_argument("--only", default="", help="measure only networks whose name contains this")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    prepare(arguments.threads)
    rows = []
    print(HEAD, end="")
    for name in NETWORKS:
        if arguments.only not in name:
            continue
        rows.append(
            measure(name, arguments.batch, arguments.size, arguments.seconds, arguments.lone)
        )
        print(line(rows[-1]), end="", flush=True)
    if arguments.save:
        print(save(arguments.save, rows))
    if arguments.save == "fuse":
        before, _, rest = PAGE.read_text().partition(BEGIN)
        table = HEAD + "".join(map(line, rows))
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
