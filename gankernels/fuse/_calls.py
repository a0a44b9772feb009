"""Finds out in which order a network calls its layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from gankernels.fuse._source import is_called_whole
from gankernels.fuse._trace import UntraceableError, traces


@dataclass(frozen=True)
class Pair:
    """Two kinds of layers that one layer can compute.

    Attributes:
        main: classes of the layer with the parameters, which will compute both.
        other: classes of the layer that will be an identity.
        orders: whether `other` may come before `main`, in the order of preference.
        suits: whether `other` and `main` can be computed as one, by their settings.
    """

    main: tuple[type[nn.Module], ...]
    other: tuple[type[nn.Module], ...]
    orders: tuple[bool, ...] = (False, True)
    suits: Callable[[Any, Any], bool] = lambda other, main: True


@dataclass(frozen=True)
class Match:
    """A layer `other` and the layers `sharing` it, each of which makes a pair with it."""

    other: nn.Module
    other_first: bool
    sharing: tuple[nn.Module, ...]


class Calls:
    """All calls of the layers of a network, as nodes of traces.

    Args:
        names: the names of all modules.
        wanted: classes of layers. Modules without any such layer are not traced.
    """

    def __init__(self, names: dict[nn.Module, str], wanted: set[type[nn.Module]]) -> None:
        self.names = names
        self.wanted = wanted
        self.nodes: dict[nn.Module, list[fx.Node]] = {}
        #: Layers whose calls may be missing in the traces, and why.
        self.hidden: dict[nn.Module, str] = {}

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop the references to layers, which reference cycles in graphs would keep alive."""
        for node in itertools.chain(*self.nodes.values()):
            node.meta.clear()

    def trace(self) -> None:
        """Trace the network. It may leave attributes changed."""
        for owner in self.names:
            if not owner._modules or type(owner).forward is nn.Module.forward or _is_wrapper(owner):
                continue
            if not any(type(m) in self.wanted for m in owner.modules()):
                continue
            before = dict(vars(owner))
            try:
                graphs = traces(owner)
            except UntraceableError as error:
                self._hide(owner, str(error))
                continue
            finally:  # immediately, since the next trace may depend on them
                vars(owner).clear()
                vars(owner).update(before)
            for node in itertools.chain(*(graph.nodes for graph in graphs)):
                if node.op == "call_module":
                    node.meta["module"] = owner.get_submodule(str(node.target))
                    self.nodes.setdefault(node.meta["module"], []).append(node)

    def _hide(self, owner: nn.Module, error: str) -> None:
        """Note the layers that a forward which cannot be traced may call."""
        why = f"forward of {self.names[owner]} ({type(owner).__name__}) cannot be traced: {error}"
        for name, child in owner.named_children():
            if not child._modules or not is_called_whole(owner, name):
                self.hidden.update(dict.fromkeys(child.modules(), why))

    def following(self, layer: nn.Module) -> nn.Module | None:
        """A layer that is called with the result of this one."""
        return next(filter(None, map(_next, self.nodes.get(layer, ()))), None)

    def match(self, main: nn.Module, pair: Pair) -> Match | str:
        """The layer to fuse `main` with, or why there is none."""
        if main in self.hidden:
            return self.hidden[main]
        if main not in self.nodes:
            return "no forward calls it"
        reasons = []
        for other_first in pair.orders:
            to_other, to_main = (_previous, _next) if other_first else (_next, _previous)
            found = [to_other(node) for node in self.nodes[main]]
            other = next((m for m in found if type(m) in pair.other), None)
            if other is None:
                continue
            place = f"{'preceded' if other_first else 'followed'} by {self.names[other]}"
            nodes = self.nodes[other]
            sharing = tuple(dict.fromkeys(map(to_main, nodes)))
            in_place = getattr(other, "inplace", False)
            if any(m is not other for m in found):
                reasons.append(f"{place}, but not wherever it is used")
            elif other in self.hidden:
                reasons.append(f"{place}; {self.hidden[other]}")
            elif not all(self._always_goes_to(m, other, pair, to_other) for m in sharing):
                reasons.append(f"{place}, which has other uses too: give it one of its own")
            elif why := unfit(other, pair.other):
                reasons.append(f"{place}, which cannot be fused: {why}")
            elif not all(pair.suits(other, m) for m in sharing):
                reasons.append(f"{place}, but their settings do not match")
            elif other_first and any(node.next not in node.users for node in nodes):
                reasons.append(f"{place}, with something else done in between")
            elif other_first and in_place and not all(map(_owns_input, nodes)):
                reasons.append(f"{place}, in place on a tensor that others may see")
            else:
                return Match(other, other_first, tuple(m for m in sharing if m is not None))
        return (reasons or [_describe(self.nodes[main])])[0]

    def _always_goes_to(
        self,
        main: nn.Module | None,
        other: nn.Module,
        pair: Pair,
        to_other: Callable[[fx.Node], nn.Module | None],
    ) -> bool:
        """Whether `main` can be fused, and makes a pair with `other` wherever it is called."""
        if main is None or main in self.hidden or unfit(main, pair.main):
            return False
        return all(to_other(node) is other for node in self.nodes[main])


def unfit(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why this layer cannot be half of any pair, or None if it can."""
    kind = type(layer)
    if kind not in kinds:
        return f"{kind.__name__} is a subclass"
    hooks = [
        name
        for name, value in vars(layer).items()
        if name.endswith(("forward_hooks", "pre_hooks", "backward_hooks"))
        and "state_dict" not in name
        and value
    ]
    if hooks:
        return f"it has hooks ({hooks[0]}), which would see other tensors: remove them first"
    if "forward" in vars(layer):
        return "its forward is replaced"
    tensors = [*layer.parameters(False), *(b for b in layer.buffers(False) if b.dim())]
    if len({t.dtype for t in tensors}) > 1:
        return "its parameters and statistics are of different dtypes"
    return None


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's modules that call the module they hold as a whole."""
    compiled = "_orig_mod" in module._modules
    return compiled or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _next(node: fx.Node) -> nn.Module | None:
    """The module that gets the result of this call, if nothing else does."""
    users = list(node.users)
    if len(users) != 1 or users[0].args != (node,) or users[0].kwargs:
        return None
    if users[0].meta["grad"] != node.meta["grad"]:  # one of them is under torch.no_grad()
        return None
    return users[0].meta.get("module")


def _previous(node: fx.Node) -> nn.Module | None:
    """The module whose result this call gets, if no other call does."""
    before = node.args[0] if node.args else None
    if isinstance(before, fx.Node) and _next(before) is not None:
        return before.meta.get("module")
    return None


def _owns_input(node: fx.Node) -> bool:
    """Whether a call gets a tensor that nothing else uses and that is not a view."""
    return isinstance(_previous(node), (_ConvNd, nn.Linear))


def _describe(nodes: list[fx.Node]) -> str:
    """Why the result of these calls is not the input of a single activation."""
    for node in nodes:
        users = list(node.users)
        if len(users) != 1:
            return f"its output is used {len(users)} times"
        if users[0].op == "output":
            return "its output leaves the module that calls it"
        if "module" in users[0].meta:
            continue
        name = getattr(users[0].target, "__name__", users[0].target)
        if str(name).rstrip("_") in ("relu", "leaky_relu"):
            return f"followed by {name} as a function: as a module it would be fused"
        return f"followed by {name}"
    return f"followed by {type(next(iter(nodes[0].users)).meta['module']).__name__}"
