"""Adam on CPU in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as hooks

from gankernels._library import LOADED
from gankernels.train.cpu import Cast


class Adam(torch.optim.Adam):
    """What `torch.optim.Adam` computes, in one call of a kernel (csrc/kernels/adam.h).

    Gradients in bfloat16 are taken as they are, and casts of parameters are written with them. Its
    states and state_dict are PyTorch's, and it becomes PyTorch's again where it is asked for what
    the kernel cannot do.
    """

    casts: Mapping[Tensor, Cast] = MappingProxyType({})

    @staticmethod
    def take_over(optimizer: torch.optim.Optimizer, casts: Mapping[Tensor, Cast]) -> None:
        """Let `optimizer` be one of this class if it is PyTorch's, with what the kernel can do."""
        if LOADED and type(optimizer) is torch.optim.Adam and _can_step(optimizer):
            optimizer.__class__ = Adam
            optimizer.casts = casts
            optimizer._step_supports_amp_scaling = False  # so that a GradScaler unscales and skips

    @contextmanager
    def half_gradients(self) -> Iterator[None]:
        """Gradients of casts stay in half precision inside, if nobody is to see them but `step`."""
        hooked = self._optimizer_step_pre_hooks or hooks._global_optimizer_pre_hooks
        casts = []
        if not hooked and all(map(_is_plain, self.param_groups)):
            casts = [
                self.casts[p] for p in self._parameters() if p in self.casts and not _hooked(p)
            ]
        for cast in casts:
            cast.keeps_gradient, cast.gradient = True, None
        try:
            yield
        finally:
            for cast in casts:
                cast.keeps_gradient = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not all(map(_is_plain, self.param_groups)):
            self.__class__ = torch.optim.Adam
            return self.step(closure)
        return self._step(closure)

    step.hooked = True  # PyTorch's mark of what calls hooks, as `_step` does

    @torch.optim.Optimizer.profile_hook_step
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        nothing = torch.empty(0)
        for group in self.param_groups:
            moved = [(p, g) for p in group["params"] if (g := self._gradient(p)) is not None]
            if not moved:
                continue
            parameters, gradients = zip(*moved, strict=True)
            states = [self.state[p] or self._start(p) for p in parameters]
            casts = [self.casts.get(p) for p in parameters]
            written = [nothing if cast is None else cast.value for cast in casts]
            torch.ops.gankernels.adam_.default(
                parameters,
                gradients,
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

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        gradient = parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise RuntimeError("Adam does not support sparse gradients, use SparseAdam instead")
        half = self.casts[parameter].take_gradient() if parameter in self.casts else None
        if gradient is None or half is None:
            return half if gradient is None else gradient
        return gradient + half

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, and leaves all as it was, for a state that no Adam has left behind."""
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
            raise ValueError(f"this is no state of Adam: {error!r}") from error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if not _can_step(self):
            self.__class__ = torch.optim.Adam

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


def _can_step(optimizer: torch.optim.Adam) -> bool:
    if "step" in vars(optimizer):  # schedulers, for one, put a function there that calls PyTorch's
        return False
    return all(
        _is_plain(group) and all(map(_is_dense_float32, group["params"]))
        for group in optimizer.param_groups
    )


def _is_plain(group: dict[str, Any]) -> bool:
    unknown = ("amsgrad", "maximize", "differentiable", "capturable", "decoupled_weight_decay")
    return not (any(group.get(name) for name in unknown) or isinstance(group["lr"], Tensor))


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "betas", "eps", "weight_decay"):
        numbers = group[name] if name == "betas" else (group[name],)
        tensor = name == "lr" and isinstance(group[name], Tensor)  # then PyTorch's Adam steps
        if not tensor and not all(isinstance(n, Real) for n in numbers):
            raise ValueError(f"{name} must be a number, or two for betas, got {group[name]!r}")
    if len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers, got {group['betas']!r}")


def _checked_state(name: str, state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state in the parameter's layout, if it can be this parameter's."""
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


def _is_dense_float32(p: Tensor) -> bool:
    dense = p.is_contiguous() or torch.empty_like(p).stride() == p.stride()
    return p.device.type == "cpu" and p.dtype == torch.float32 and dense


def _hooked(p: Tensor) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)
