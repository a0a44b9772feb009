"""What `gk.fuse(network)` does to networks as others write them: the same results, sooner.

``python benchmarks/fuse.py`` prints a table, ``--save NAME`` writes results/ as well and ``--save
fuse`` also the table of docs/migrating.md. A row says how many pairs were found; how far outputs,
gradients and second derivatives in float64 are from those of the network before; and how many times
faster it is in float32. "Forward + backward" is one pass and the gradients of all parameters;
"penalty step" is what a WGAN-GP critic does: two passes, a gradient penalty written by hand in
PyTorch, backward and Adam. How much of the time goes into convolutions, which stay as they are,
decides the ratio.
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
    """How far what a user can see of two networks is apart, in float64: the output, the gradients
    of its square by input and parameters, and those of a penalty on the gradient by the input.

    A tensor's difference is the largest of its elements, relative to its largest value, or to a
    thousandth of that of all gradients where this is more: the gradient of a bias in front of a
    norm is nothing but rounding.
    """

    def visible(network: nn.Module) -> dict[str, list[Tensor]]:
        network, leaf = copy.deepcopy(network).double(), x.double().requires_grad_()
        weights = list(network.parameters())
        out = network(leaf)
        # Squared, since the sum of what comes out of a norm does not depend on the input.
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
    """A network's row of results/."""
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
    """A network's row of the printed table."""
    cells = [row["network"], f"{row['fused']} of {row['pairs']}"]
    cells += [f"{value:.0e}" if value else "0" for value in row["differences"].values()]
    cells += [f"{row['times_faster'][what]:.2f}x" for what in TIMED]
    return f"| {' | '.join(cells)} |\n"


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
