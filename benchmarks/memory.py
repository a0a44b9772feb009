"""Measures the memory that a training step saves for backward, and its peak allocation.

``python benchmarks/memory.py`` prints a table in Markdown, ``--save NAME`` writes results/. The
networks are those of examples/dcgan.py. "DCGAN" is a step of both players; "WGAN-GP" is one of its
critic, gradient penalty included. "Saved" is the most that autograd holds at a time, as distinct
storages seen by ``saved_tensors_hooks``, without parameters and buffers; "allocated" is the most
that the step allocates in addition to the memory before it, from PyTorch's profiler (which does not
see the allocations of libraries such as oneDNN).

Of a BatchNorm + LeakyReLU pair, with x going in, z in between and y coming out, there is kept
  - by eager PyTorch x and z, and by the next convolution y;
  - where the activation is in place x, and y, which is z's memory, by both activation and
    convolution;
  - by the fused layer x, and by the convolution y;
and two numbers per channel in all of them. In-place activated batch norm (Rota Bulò et al., 2018,
arXiv:1712.02616) writes y over x and computes x back from it: y alone. That column is computed, as
the fused network without the storages of x. It needs an activation that can be inverted (not ReLU,
which the generator has: the column is what LeakyReLU there would bring), and has no second
derivative.
"""

from __future__ import annotations

import argparse
import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from gradient_penalty import critic_step, eager_penalty
from script import save
from torch import Tensor, nn

import gankernels as gk
from gankernels.nn.batch_norm_leaky_relu import _BatchNormActivation

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from dcgan import blobs, discriminator, generator


class Saved:
    """Counts the tensors that autograd holds, now and at most, in bytes of distinct storages."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.apart = {_storage(t) for m in networks for t in (*m.parameters(), *m.buffers())}
        self.inputs: set[int] = set()  # storages of the inputs of fused layers
        self.held: Counter[int] = Counter()
        self.bytes = self.bytes_of_inputs = 0
        self.peak = self.peak_without_inputs = 0

    def sees_input(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, _BatchNormActivation):
            self.inputs.add(_storage(inputs[0]))

    def pack(self, tensor: Tensor) -> _Held:
        held, key = _Held(tensor), _storage(tensor)
        size = tensor.untyped_storage().nbytes()
        if key not in self.apart:
            self.held[key] += 1
            if self.held[key] == 1:
                self.count(key, size)
            weakref.finalize(held, self.release, key, size)
        return held

    def release(self, key: int, size: int) -> None:
        self.held[key] -= 1
        if not self.held[key]:
            self.count(key, -size)
            self.inputs.discard(key)  # the address may be another tensor's next

    def count(self, key: int, size: int) -> None:
        self.bytes += size
        self.bytes_of_inputs += size if key in self.inputs else 0
        self.peak = max(self.peak, self.bytes)
        without = self.bytes - self.bytes_of_inputs
        self.peak_without_inputs = max(self.peak_without_inputs, without)


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure(step: Callable[[], object], *networks: nn.Module) -> dict[str, int]:
    """Measures the second of two steps, after the optimizers have allocated their state."""
    step()
    saved = Saved(networks)
    # For all modules, since a pair that gets a hook of its own is two layers again.
    hook = nn.modules.module.register_module_forward_pre_hook(saved.sees_input)
    with (
        hook,
        torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile,
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor),
    ):
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return {
        "saved": saved.peak,
        "saved_without_inputs": saved.peak_without_inputs,
        "allocated": most,
    }


def dcgan(G: nn.Module, D: nn.Module, batch: int) -> Callable[[], None]:
    """Returns a step of both players, as in examples/dcgan.py."""
    adams = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (G, D)]
    real, noise = blobs(batch), torch.randn(batch, 100, 1, 1)

    def step() -> None:
        fake = G(noise)
        (F.softplus(-D(real)).mean() + F.softplus(D(fake.detach())).mean()).backward()
        adams[1].step()
        adams[1].zero_grad()
        F.softplus(-D(fake)).mean().backward()
        adams[0].step()
        for adam in adams:
            adam.zero_grad()

    return step


def wgan_gp(G: nn.Module, D: nn.Module, batch: int) -> Callable[[], object]:
    """Returns a step of the critic alone, with the penalty written by hand."""
    return critic_step(D, eager_penalty, blobs(batch), blobs(batch))


STEPS = {"DCGAN": dcgan, "WGAN-GP": wgan_gp}


def variants(width: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    in_place = generator(width), discriminator(width)
    eager = copy.deepcopy(in_place)
    for m in eager:
        for layer in m.modules():
            if hasattr(layer, "inplace"):
                layer.inplace = False
    return {
        "eager": eager,
        "eager, in place": in_place,
        "fused": tuple(gk.fuse(copy.deepcopy(m)) for m in in_place),
    }


def line(row: dict) -> str:
    """Formats a row of the table in Markdown."""
    figures = (row["saved"], row["allocated"])
    cells = ("-" if f is None else f"{f / 2**20:.1f}" for f in figures)
    return f"| {row['step']} | {row['network']} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    rows = []
    print("| step | network | saved, MiB | allocated, MiB |\n|---|---|---|---|")
    for name, make in STEPS.items():
        for variant, networks in variants(arguments.width).items():
            torch.manual_seed(0)
            found = measure(make(*networks, arguments.batch), *networks)
            without = found.pop("saved_without_inputs")
            table = {variant: found}
            if variant == "fused" and make is dcgan:
                table["in-place ABN, computed"] = {"saved": without, "allocated": None}
            for label, values in table.items():
                size = {"batch": arguments.batch, "width": arguments.width}
                rows.append({"step": name, "network": label, **size, **values})
                print(line(rows[-1]), flush=True)
    if arguments.save:
        print(save(arguments.save, rows))


if __name__ == "__main__":
    main()
