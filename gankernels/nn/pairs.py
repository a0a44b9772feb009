"""A BatchNorm and an activation that :func:`gankernels.fuse` lets compute as one.

The two stay where they are, and stay a BatchNorm and an activation to whoever asks: the norm's
slot holds the fused layer, the activation's a layer that has nothing left to do. They are a pair as
long as that is all there is to it. Whoever replaces or drops one of them, hooks into one, copies
the norm or folds it into a convolution deals with two layers, so two layers they are again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _module


class Ref:
    """A weak reference to a layer that copies and pickles of a network take along."""

    def __init__(self, layer: nn.Module | None) -> None:
        self._get = (lambda: None) if layer is None else weakref.ref(layer)

    def __call__(self) -> nn.Module | None:
        return self._get()

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        return Ref, (self(),)


class Half(nn.Module):
    """What the layers that may be half of a pair have in common."""

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if "_before_fusion" not in vars(self) or finalizing():
            return
        for ref in vars(self)["_before_fusion"][1]:
            # A shallow copy, as nn.DataParallel makes them, is nobody's partner.
            if (partner := ref()) is not None and any(p is self for p in _partners(partner)):
                with contextlib.suppress(TypeError, ValueError):
                    take_apart(partner)


def _partners(layer: nn.Module) -> list[nn.Module | None]:
    return [ref() for ref in vars(layer).get("_before_fusion", (None, ()))[1]]


def _registering(name: str) -> Callable:
    def register(self, *args, **kwargs):
        come_apart(self, "one of them gets a hook")
        return getattr(nn.Module, name)(self, *args, **kwargs)

    return register


for _name in (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
):
    setattr(Half, _name, _registering(_name))


class _Done(Half):
    """An activation that the norm of its pair computes."""

    __jit_ignored_attributes__ = ("_before_fusion",)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads only this by itself)
            if isinstance(input, Proxy):
                return call_in_trace(self, input)
        return input


class FusedReLU(_Done, nn.ReLU):
    """A ReLU that the norm of its pair computes."""


class FusedLeakyReLU(_Done, nn.LeakyReLU):
    """A LeakyReLU that the norm of its pair computes, with the slope that is set here."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "negative_slope":
            for norm in filter(None, _partners(self)):
                norm.negative_slope = value


_DONE = {nn.ReLU: FusedReLU, nn.LeakyReLU: FusedLeakyReLU}


def call_in_trace(layer: nn.Module, input: Proxy) -> Proxy:
    """A call of the layer as a whole, where torch.fx would look inside as in all but torch.nn's."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


# ---- together and apart ------------------------------------------------------------------------


def pair(norms: dict[nn.Module, type[nn.Module]], activation: nn.Module | None) -> None:
    """Makes the norms fused layers of these classes; the activation, if any, is what they share."""
    _watch(_module.register_module_module_registration_hook, _replaced)
    slope = 1.0 if activation is None else getattr(activation, "negative_slope", 0.0)
    if type(activation) is nn.ReLU:
        slope = 0.0
    for norm, cls in norms.items():
        norm._before_fusion = (type(norm), () if activation is None else (Ref(activation),))
        norm.__class__ = cls
        norm.negative_slope = slope
    if activation is not None:
        activation._before_fusion = (type(activation), tuple(Ref(norm) for norm in norms))
        activation.__class__ = _DONE[type(activation)]


def take_apart(layer: nn.Module) -> None:
    """Makes the layers of a pair what they were; does nothing to layers that are of none.

    Raises:
        TypeError: where one of them is parametrized, which has changed its class too.
        ValueError: where norms that share an activation have been given different slopes.
    """
    group = [layer] if "_before_fusion" in vars(layer) else []
    for member in group:
        group += [m for m in _partners(member) if m is not None and m not in group]
    for member in group:
        if nn.utils.parametrize.is_parametrized(member):
            raise TypeError(f"{member} is parametrized: remove its parametrizations first")
    slopes = {m.negative_slope for m in group if not isinstance(m, _Done)}
    if len(slopes) > 1:
        raise ValueError(f"norms that share an activation must have one slope, got {slopes}")
    for member in group:
        done = isinstance(member, _Done)
        member.__class__ = vars(member).pop("_before_fusion")[0]
        if not done:
            del member.negative_slope
            vars(member).pop("sync", None)  # which may have been set meanwhile
        elif slopes and slopes != {getattr(member, "negative_slope", 0.0)}:
            member.__class__ = nn.LeakyReLU
            member.negative_slope = slopes.pop()


def come_apart(layer: nn.Module, why: str) -> None:
    """Takes a pair apart where other code needs the two, and says so, since it costs speed."""
    if "_before_fusion" in vars(layer):
        described = str(layer)
        take_apart(layer)
        warnings.warn(
            f"{described} is a BatchNorm and an activation by themselves again, since {why}; "
            "gankernels.fuse makes them one where they still are a pair",
            stacklevel=4,
        )


def _replaced(owner: nn.Module, name: str, layer: nn.Module | None) -> None:
    before = owner._modules.get(name)
    if before is not None and before is not layer:
        come_apart(before, "one of them is replaced")


@functools.cache
def _watch(register: Callable, hook: Callable) -> None:
    """Lets PyTorch call ``hook`` for all that modules register from now on."""
    register(hook)


# ---- copies ------------------------------------------------------------------------------------


class Eps(float):
    """The ``eps`` of a fused layer as others get it: the number, and whose it is.

    Whatever computes a norm elsewhere needs its eps: to add it to the variance where the norm is
    folded into a convolution, or to keep it in a module of its own where the norm is copied. Both
    see a BatchNorm, and would lose the activation.
    """

    __array_ufunc__ = None  # so that NumPy leaves sums to __radd__

    def __new__(cls, value: float, layer: nn.Module) -> Eps:
        _watch(_module.register_module_parameter_registration_hook, _registered)
        _watch(_module.register_module_buffer_registration_hook, _registered)
        self = super().__new__(cls, value)
        self.layer = layer
        return self

    def taken(self) -> float:
        layer = self.layer
        if "_before_fusion" in vars(layer):
            come_apart(layer, "its eps is used to copy or fold the BatchNorm")
        elif getattr(layer, "negative_slope", 1.0) != 1.0:
            raise TypeError(
                f"{layer} cannot be copied or folded as a BatchNorm, since its LeakyReLU would be "
                "lost: set its attribute sync to synchronize it, or write two layers, which "
                "gankernels.fuse makes one"
            )
        return float.__float__(self)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return value.taken() if isinstance(value, Eps) else value

        kwargs = {name: plain(value) for name, value in (kwargs or {}).items()}
        return function(*map(plain, args), **kwargs)

    def __add__(self, other):
        return self.taken() + other

    def __radd__(self, other):
        return other + self.taken()

    def __float__(self) -> float:
        return self.taken()

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (float.__float__(self),)


def _registered(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
    eps = vars(owner).get("eps")
    if type(eps) is Eps:
        owner.eps = eps.taken()
