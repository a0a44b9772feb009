"""Chooses a device by name."""

from __future__ import annotations

import os

import torch


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; processes that torchrun started take one each.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # of "meta" there is no value
    except (RuntimeError, AssertionError, ImportError) as error:
        first_line = str(error).split("\n")[0]
        raise ValueError(f"device {name!r} cannot be used: {first_line}") from error
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return device
