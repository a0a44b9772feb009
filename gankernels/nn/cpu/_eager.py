"""The condition under which the layers for CPUs use their own code."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_on_cpu(x: Tensor) -> bool:
    """Whether `x` is on the CPU and nothing transforms, compiles or traces the code."""
    if torch.compiler.is_compiling() or not x.is_cpu or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()
