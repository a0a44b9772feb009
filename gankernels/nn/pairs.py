"""Pairs of a norm and an activation that one layer computes, but that other code sees as two.

Both stay in their places, and by ``isinstance`` a BatchNorm and an activation: the norm becomes
the fused layer, the activation an identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from gankernels.nn._rewrite import (
    Half,
    become,
    call_in_trace,
    come_apart,
    is_rewritten,
    partners,
    watch,
)


class _Identity(Half):
    """A layer that its partner computes."""

    __jit_ignored_attributes__ = ("_before_fusion",)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript needs this condition alone)
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
        return input


class FusedUpsample(_Identity, nn.Upsample):
    """An Upsample that the convolution of its pair computes."""


class FusedReLU(_Identity, nn.ReLU):
    """A ReLU that the norm of its pair computes."""

    def _reverting(self, group: list[nn.Module]) -> Callable[[], None]:
        slope = slope_of(group)

        def finish() -> None:
            if slope is not None and slope != 0.0:
                self.__class__ = nn.LeakyReLU  # type: ignore[assignment]
                self.negative_slope = slope

        return finish


class FusedLeakyReLU(_Identity, nn.LeakyReLU):
    """A LeakyReLU that the norm of its pair computes, with the slope that is set here."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "negative_slope":
            for norm in filter(None, partners(self)):
                norm.negative_slope = value

    def _reverting(self, group: list[nn.Module]) -> Callable[[], None]:
        slope = slope_of(group)

        def finish() -> None:
            if slope is not None:
                self.negative_slope = slope

        return finish


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: FusedReLU,
    nn.LeakyReLU: FusedLeakyReLU,
}


def pair(norms: Mapping[nn.Module, type[nn.Module]], activation: nn.Module | None) -> None:
    """Make the norms fused layers of these classes, which share the activation, if any."""
    slope = 1.0 if activation is None else 0.0
    if isinstance(activation, nn.LeakyReLU):
        slope = activation.negative_slope
    for norm, cls in norms.items():
        become(norm, cls, *([] if activation is None else [activation]))
        vars(norm)["negative_slope"] = slope
    if activation is not None:
        become(activation, _FUSED[type(activation)], *norms)


def slope_of(group: Sequence[nn.Module]) -> float | None:
    """The slope of norms that share an activation. Raises ValueError if their slopes differ."""
    slopes: set[Any] = {m.negative_slope for m in group if not isinstance(m, _Identity)}
    if len(slopes) > 1:
        raise ValueError(f"norms that share an activation must have one slope, got {slopes}")
    return slopes.pop() if slopes else None


class Eps(float):
    """The ``eps`` of a fused layer for other code: a number that also refers to the layer.

    Other code that computes a norm needs its eps: to add it to the variance when it folds the norm
    into a convolution, or to store it when it copies the norm into another module. Such code sees
    a BatchNorm and would lose the activation.
    """

    __array_ufunc__ = None  # so that NumPy calls __radd__ for sums
    layer: nn.Module

    def __new__(cls, value: float, layer: nn.Module) -> Eps:
        watch(_module.register_module_parameter_registration_hook, _registered)
        watch(_module.register_module_buffer_registration_hook, _registered)
        self = super().__new__(cls, value)
        self.layer = layer
        return self

    def taken(self) -> float:
        layer = self.layer
        if is_rewritten(layer):
            come_apart(layer, "its eps is used to copy or fold the BatchNorm")
        elif getattr(layer, "negative_slope", 1.0) != 1.0:
            raise TypeError(
                f"{layer} cannot be copied or folded as a BatchNorm, since its LeakyReLU would be "
                "lost: set its attribute sync to synchronize it, or write two layers and fuse them "
                "by gankernels.fuse"
            )
        return float.__float__(self)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def plain(value: Any) -> Any:
            return value.taken() if isinstance(value, Eps) else value

        kwargs = {name: plain(value) for name, value in (kwargs or {}).items()}
        return function(*map(plain, args), **kwargs)

    def __add__(self, other: Any) -> Any:
        return self.taken() + other

    def __radd__(self, other: Any) -> Any:
        return other + self.taken()

    def __float__(self) -> float:
        return self.taken()

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (float.__float__(self),)


def _registered(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
    eps = vars(owner).get("eps")
    if type(eps) is Eps:
        vars(owner)["eps"] = eps.taken()
