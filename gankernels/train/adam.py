"""Adam on CPU in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gankernels._library import LOADED
from gankernels.train.cpu import Cast


class Adam(torch.optim.Adam):
    """What `torch.optim.Adam` computes, in one call of a kernel (csrc/kernels/adam.h).

    Gradients in bfloat16 are taken as they are, and casts of parameters are written with them. Its
    states and state_dict are PyTorch's.
    """

    casts: Mapping[Tensor, Cast] = MappingProxyType({})

    @staticmethod
    def take_over(optimizer: torch.optim.Optimizer, casts: Mapping[Tensor, Cast]) -> None:
        """Let `optimizer` be one of this class if it is PyTorch's, with what the kernel can do."""
        if not LOADED or type(optimizer) is not torch.optim.Adam:
            return
        for group in optimizer.param_groups:
            if group["amsgrad"] or group["maximize"] or group.get("decoupled_weight_decay"):
                return
            if isinstance(group["lr"], Tensor) or group["differentiable"] or group["capturable"]:
                return
            for p in group["params"]:
                dense = torch.empty_like(p).stride() == p.stride()
                if p.device.type != "cpu" or p.dtype != torch.float32 or not dense:
                    return
        optimizer.__class__ = Adam
        optimizer.casts = casts
        optimizer._step_supports_amp_scaling = False  # so that a GradScaler unscales and skips
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in casts and hasattr(p, "grad_dtype"):
                    p.grad_dtype = None  # whichever it comes in

    @torch.optim.Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        nothing = torch.empty(0)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] or self._start(p) for p in parameters]
            casts = [self.casts.get(p) for p in parameters]
            written = [nothing if cast is None else cast.value for cast in casts]
            torch.ops.gankernels.adam_.default(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                written,
                float(group["lr"]),
                *group["betas"],
                group["eps"],
                group["weight_decay"],
            )
            torch.autograd.graph.increment_version([*parameters, *written])
            for cast in casts:
                if cast is not None:
                    cast.version = cast.parameter._version
        return loss

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


Adam.step.hooked = True  # PyTorch's mark of a step with hooks, which it would wrap again
