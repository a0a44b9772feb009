"""Chooses a device by name."""

from __future__ import annotations

import os

import torch


def choose_device(name: str) -> torch.device:
    """The device of a name. `auto` is a GPU if there is one; each process of torchrun has its own.

    Raises ValueError for a device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # refuses "meta", which has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        first_line = str(error).split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {first_line}") from error
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return device
