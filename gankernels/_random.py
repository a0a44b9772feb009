"""PyTorch's default random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that operations on the device use by default."""
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[device.index]


def default_generators(device: torch.device) -> list[torch.Generator]:
    """The default generators of the CPU and of the device."""
    own = default_generator(device)
    return [own] if device.type == "cpu" else [torch.default_generator, own]


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore the state of these generators at the end."""
    states = [(rng, rng.get_state()) for rng in default_generators(device)]
    try:
        yield
    finally:
        for rng, state in states:
            rng.set_state(state)
