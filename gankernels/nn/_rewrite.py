"""Rewrites layers in place, by changing the class of the object, and reverts them.

Layers that are rewritten together are a pair, or a group, as long as each of them is only used as
part of it. Code that replaces or removes one of them, or adds a hook to one, needs the separate
layers: the pair is then reverted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

#: The attribute with a layer's former class and references to its partners.
_RECORD = "_before_fusion"


class Ref:
    """A weak reference to a layer that is copied and pickled with its network."""

    def __init__(self, layer: nn.Module | None) -> None:
        self._get = (lambda: None) if layer is None else weakref.ref(layer)

    def __call__(self) -> nn.Module | None:
        return self._get()

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        return Ref, (self(),)


class Half(nn.Module):
    """Base class of layers that may be part of a pair."""

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if _RECORD not in vars(self) or finalizing():
            return
        for ref in vars(self)[_RECORD][1]:
            # A shallow copy, as made by nn.DataParallel, has no partners.
            if (partner := ref()) is not None and any(p is self for p in partners(partner)):
                with contextlib.suppress(TypeError, ValueError):
                    revert(partner)

    def _reverting(self, group: list[nn.Module]) -> Callable[[], None]:
        """Returns a function to call once the layers of a group have their former classes again.

        This method is called before, and may raise ValueError; the group is then not changed.
        """
        return lambda: None


def _registering(name: str) -> Callable[..., Any]:
    def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
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


def become(layer: nn.Module, cls: type[nn.Module], *others: nn.Module) -> None:
    """Give a layer another class, until `revert` gives it and the others the former ones."""
    if others:
        watch(_module.register_module_module_registration_hook, _replaced)
    vars(layer)[_RECORD] = (type(layer), tuple(map(Ref, others)))
    layer.__class__ = cls


def revert(layer: nn.Module) -> None:
    """Give a layer and its partners their former classes; does nothing to other layers.

    Raises:
        TypeError: if one of them is parametrized, which also changed its class.
        ValueError: if norms that share an activation have different slopes.
    """
    group = [layer] if is_rewritten(layer) else []
    for member in group:
        group += [m for m in partners(member) if m is not None and m not in group]
    for member in group:
        if nn.utils.parametrize.is_parametrized(member):
            raise TypeError(f"{member} is parametrized: remove its parametrizations first")
    rest = [member._reverting(group) for member in group if isinstance(member, Half)]
    for member in group:
        member.__class__ = vars(member).pop(_RECORD)[0]
    for finish in rest:
        finish()


def come_apart(layer: nn.Module, why: str) -> None:
    """Revert the layers of a pair that other code needs, and warn, since it costs speed."""
    if is_rewritten(layer):
        described = str(layer)
        revert(layer)
        warnings.warn(
            f"{described} is two layers again, as before gankernels.fuse, since {why}; "
            "gankernels.fuse makes them one again if they are still a pair",
            stacklevel=4,
        )


def is_rewritten(layer: nn.Module) -> bool:
    return _RECORD in vars(layer)


def partners(layer: nn.Module) -> list[nn.Module | None]:
    return [ref() for ref in vars(layer).get(_RECORD, (None, ()))[1]]


def call_in_trace(layer: nn.Module, input: Proxy) -> Proxy:
    """Record the layer as one call in a torch.fx trace, as torch.fx does for torch.nn's layers."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


@functools.cache
def watch(register: Callable[[Callable[..., None]], object], hook: Callable[..., None]) -> None:
    """Let PyTorch call ``hook`` for everything that modules register from now on."""
    register(hook)


def _replaced(owner: nn.Module, name: str, layer: nn.Module | None) -> None:
    before = owner._modules.get(name)
    if before is not None and before is not layer and partners(before):
        come_apart(before, "one of them is replaced")
