"""Optimizers whose steps are computed by kernels of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as hooks

from gankernels._library import LOADED

__all__ = ["Adam"]


class Adam(torch.optim.Adam):
    """:class:`torch.optim.Adam` with steps in one kernel call on CPUs.

    Arguments, hooks, ``state_dict()`` and results (up to rounding) are those of
    :class:`torch.optim.Adam`, and the state of either can be loaded into the other. The kernel
    steps float32 parameters on CPUs. PyTorch's own step is used for everything else: other
    devices and dtypes, ``amsgrad``, ``maximize``, ``capturable``, ``differentiable``,
    ``decoupled_weight_decay``, a learning rate that is a tensor, and parameters with gaps in
    memory.

    Attributes:
        copies: a bfloat16 copy for some of the parameters, which every step updates.
        half_gradients: gradients in bfloat16 for some of the parameters. A step takes them from
            here and adds them to ``grad``, without a conversion where ``grad`` is None.

    Example::

        optimizer = gankernels.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    """

    copies: Mapping[Tensor, Tensor] = MappingProxyType({})
    half_gradients: MutableMapping[Tensor, Tensor] | None = None

    @property
    def takes_half_gradients(self) -> bool:
        """Whether the next step reads ``half_gradients``, and no code reads ``grad`` before it."""
        hooked = self._optimizer_step_pre_hooks or hooks._global_optimizer_pre_hooks
        return not hooked and self._kernel_can_step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self._kernel_can_step():
            return self._step_of_pytorch(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._unscale():
            return loss
        nothing = torch.empty(0)
        for group in self.param_groups:
            moved = [(p, g) for p in group["params"] if (g := self._gradient(p)) is not None]
            if not moved:
                continue
            parameters, gradients = zip(*moved, strict=True)
            states = [self.state[p] or self._start(p) for p in parameters]
            copies = [self.copies.get(p, nothing) for p in parameters]
            torch.ops.gankernels.adam_.default(
                parameters,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                copies,
                float(group["lr"]),
                *group["betas"],
                group["eps"],
                group["weight_decay"],
            )
            torch.autograd.graph.increment_version([*parameters, *copies])
        return loss

    def _step_of_pytorch(self, closure: Callable[[], Any] | None) -> Any:
        for parameter in self._parameters() if self.half_gradients else ():
            gradient = self._gradient(parameter)
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        step = torch.optim.Adam.step
        if getattr(step, "hooked", False):  # the hooks are called around this class's own step
            step = step.__wrapped__  # type: ignore[attr-defined]
        loss = step(self, closure)
        for parameter in self._parameters():
            if parameter in self.copies:
                self.copies[parameter].copy_(parameter)
        return loss

    def _kernel_can_step(self) -> bool:
        return (
            LOADED
            and all(map(_is_plain, self.param_groups))
            and all(map(_is_dense_float32, self._parameters()))
        )

    def _unscale(self) -> bool:
        """Divide gradients by the scale of a GradScaler that leaves it to the optimizer, as it does
        with ``fused=True``. False if they are not finite: the step is then skipped."""
        found_inf, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and found_inf.item():
            return False
        if scale is not None:
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, scale.double().reciprocal().float())
        return True

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        gradient = parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise RuntimeError("Adam does not support sparse gradients, use SparseAdam instead")
        half = self.half_gradients.pop(parameter, None) if self.half_gradients else None
        if gradient is None or half is None:
            return half if gradient is None else gradient
        return gradient + half

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of :class:`torch.optim.Adam`.

        Raises:
            ValueError: if it is not a state of Adam. The optimizer is then unchanged.
        """
        before = {name: vars(self)[name] for name in ("state", "param_groups")}
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                _check_options(group)
            for index, parameter in enumerate(self._parameters()):
                if state := self.state.get(parameter):
                    self.state[parameter] = _checked_state(f"state[{index}]", state, parameter)
        except Exception as error:
            vars(self).update(before)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"state_dict must be a state of Adam, got {error!r}") from error

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


def _is_plain(group: dict[str, Any]) -> bool:
    unknown = ("amsgrad", "maximize", "differentiable", "capturable", "decoupled_weight_decay")
    return not (any(group.get(name) for name in unknown) or isinstance(group["lr"], Tensor))


def _is_dense_float32(p: Tensor) -> bool:
    if not p.is_cpu or p.dtype != torch.float32:
        return False
    return p.is_contiguous() or torch.empty_like(p).stride() == p.stride()


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "betas", "eps", "weight_decay"):
        numbers = group[name] if name == "betas" else (group[name],)
        tensor = name == "lr" and isinstance(group[name], Tensor)  # PyTorch's step accepts one
        if not tensor and not all(isinstance(n, Real) for n in numbers):
            raise ValueError(f"{name} must be a number, or two for betas, got {group[name]!r}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']!r}")


def _checked_state(name: str, state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state in the parameter's memory layout. Raises ValueError unless it fits."""
    checked = dict(state)
    for moment in ("exp_avg", "exp_avg_sq"):
        value = state.get(moment)
        if (
            not isinstance(value, Tensor)
            or value.shape != parameter.shape
            or not value.is_floating_point()
        ):
            raise ValueError(
                f"{name}[{moment!r}] must be a floating-point tensor of its parameter's shape "
                f"{tuple(parameter.shape)}, got {_described(value)}"
            )
        checked[moment] = torch.empty_like(parameter).detach().copy_(value)
    step = state.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1 or not 0 <= float(step) < 2**62:
        raise ValueError(f"{name}['step'] must be one number of steps, got {_described(step)}")
    checked["step"] = step.float()
    return checked


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.numel() == 1 and not value.is_meta:
        return f"{value.item()}"
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
