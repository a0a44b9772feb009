"""Puts the fused layers into networks that were written without them, and takes them out again.

What follows what is read off ``forward``: every module that has a BatchNorm somewhere inside is
traced by torch.fx with its children as black boxes, once per way that its code can go. A pair is
fused where all uses of both layers, in all traces, are that pair. So every module that is made of
others gives the results it gave before, whoever calls it.

The layers change their class, and stay the same objects: parameters, buffers, state_dict keys,
train/eval, and whoever else holds a reference keep what they have.
"""

from __future__ import annotations

import ast
import dis
import inspect
import itertools
import textwrap
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gankernels import nn as fused
from gankernels._restore import as_it_was, names_in
from gankernels.nn.batch_norm_leaky_relu import LeakyReLUSyncBatchNorm, SyncBatchNormLeakyReLU
from gankernels.nn.pairs import pair, take_apart

__all__ = ["fuse", "unfuse"]

# The layer for BatchNorm first, and the one for the activation first.
_NORMS = {
    nn.BatchNorm1d: (fused.BatchNormLeakyReLU1d, fused.LeakyReLUBatchNorm1d),
    nn.BatchNorm2d: (fused.BatchNormLeakyReLU2d, fused.LeakyReLUBatchNorm2d),
    nn.BatchNorm3d: (fused.BatchNormLeakyReLU3d, fused.LeakyReLUBatchNorm3d),
    nn.SyncBatchNorm: (SyncBatchNormLeakyReLU, LeakyReLUSyncBatchNorm),
}
_ACTIVATIONS = (nn.LeakyReLU, nn.ReLU)
_FUSED = tuple(itertools.chain(*_NORMS.values()))


def fuse(
    module: nn.Module, *, lone: bool = False, report: Callable[[str], object] | None = None
) -> nn.Module:
    """Lets a network compute its BatchNorm + LeakyReLU pairs by the fused layers, in place.

    BatchNorm followed by LeakyReLU or ReLU, and LeakyReLU or ReLU followed by BatchNorm, in an
    ``nn.Sequential`` or as attributes that a ``forward`` calls one after the other; one activation
    may serve several BatchNorms, if nothing else uses it. The BatchNorm becomes a
    :class:`gankernels.nn.BatchNormLeakyReLU2d` (or its relative), the activation a layer with
    nothing left to do. Parameters and buffers are the very same, the keys of ``state_dict()`` too,
    so optimisers and checkpoints of before go on as they are. Results differ by rounding only. A
    SyncBatchNorm becomes a layer with ``sync=True`` and keeps its process group.

    Args:
        module: the whole network. A part of it will do where no other part calls its layers.
        lone: whether a BatchNorm without an activation beside it is replaced too (slope 1). The
            forward pass of a small one gains nothing, a gradient penalty does.
        report: called with one line of text for every BatchNorm: what it was fused with, or why it
            was left alone. ``print`` shows them, ``lines.append`` keeps them.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: where an argument is not of its type, or ``module`` is compiled by TorchScript.

    Left alone, with the reason in the report: layers with hooks, subclasses of BatchNorm, a
    BatchNorm whose output is used twice, an activation that has other uses too or is a function
    (``F.leaky_relu``), pairs that are divided between modules, an in-place activation whose input
    may be seen by others, and what is called by a ``forward`` that torch.fx cannot trace. (In that
    case an ``nn.Sequential`` is still looked at where its owner only ever calls it as a whole.)

    The two stay a BatchNorm and an activation to code that asks by ``isinstance``, and become two
    layers again, with a warning, where code needs two: where one of them is replaced or gets a
    hook, and where the BatchNorm is folded into a convolution or made another kind of norm
    (``convert_sync_batchnorm``; setting ``sync`` keeps the fused layer).

    ``forward`` is read as it goes at the time of the call: where it depends on attributes other
    than ``training``, set them first. Code that calls one of the two layers by itself from
    elsewhere, such as ``network.bn1(x)`` in a training loop, is not seen.

    The fused layers have two derivatives. What needs a third, forward-mode derivatives or
    ``torch.vmap`` takes :func:`unfuse` first.

    Example::

        gankernels.fuse(discriminator, report=print)
    """
    _check(module)
    if not isinstance(lone, bool):
        raise TypeError(f"lone is a {type(lone).__name__}; a bool is needed")
    if report is not None and not callable(report):
        raise TypeError(f"report is a {type(report).__name__}; a function of a line is needed")
    names = {m: name or "module" for name, m in module.named_modules()}
    norms = [m for m in names if isinstance(m, _BatchNorm) and not isinstance(m, _FUSED)]
    calls = None
    if any(type(m) in _NORMS for m in norms):
        with as_it_was(module):
            calls = _Calls(names)
    lines = [] if norms else ["no BatchNorm to fuse"]
    partners: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        why = None if norm in partners else _unfit(norm)
        if why:
            lines.append(f"left {names[norm]}: {why}")
            continue
        if norm not in partners:
            activation, first, sharing, why = calls.partner(norm)
            if activation is not None:
                pair({norm: _NORMS[type(norm)][first] for norm in sharing}, activation)
                partners.update(dict.fromkeys(sharing, activation))
        if norm in partners:
            lines.append(f"fused {names[norm]} with {names[partners[norm]]}: {norm}")
        elif lone and not why.endswith(_TYPES):
            pair({norm: _NORMS[type(norm)][0]}, None)
            lines.append(f"fused {names[norm]} alone ({why}): {norm}")
        else:
            lines.append(f"left {names[norm]}: {why}")
    if calls is not None:
        calls.forget()
    for line in lines if report else ():
        report(line)
    return module


def unfuse(module: nn.Module) -> nn.Module:
    """Undoes :func:`fuse`, in place: BatchNorm and activation are what they were.

    Parameters, buffers and keys stay the same. It works on copies and unpickled networks too, and
    leaves layers alone that were not made by :func:`fuse`.

    Args:
        module: a network, or a part of one.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: where ``module`` is no module.
    """
    _check(module)
    for layer in list(module.modules()):
        take_apart(layer)
    return module


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; a torch.nn.Module is needed")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("module is compiled by TorchScript; fuse the module it was made from")


def _unfit(layer: nn.Module) -> str | None:
    """Why this layer itself, whatever stands beside it, is left alone."""
    kind = type(layer)
    if kind not in (*_NORMS, *_ACTIVATIONS):
        return f"{kind.__name__} is a class of its own"
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


# ---- who calls what ----------------------------------------------------------------------------


class _Calls:
    """All calls of the layers of a network, as nodes of traces."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.nodes: dict[nn.Module, list[fx.Node]] = {}
        self.hidden: dict[nn.Module, str] = {}  # layers that may have calls not known here
        for owner in names:
            if not owner._modules or type(owner).forward is nn.Module.forward or _is_wrapper(owner):
                continue
            if not any(type(m) in _NORMS for m in owner.modules()):
                continue
            before = dict(vars(owner))
            try:
                graphs = _traces(owner)
            except _UntraceableError as error:
                self._hide(owner, str(error))
                continue
            finally:  # the rest is taken back when all have been traced
                vars(owner).clear()
                vars(owner).update(before)
            for node in itertools.chain(*(graph.nodes for graph in graphs)):
                if node.op == "call_module":
                    node.meta["module"] = owner.get_submodule(node.target)
                    self.nodes.setdefault(node.meta["module"], []).append(node)

    def forget(self) -> None:
        """Lets go of the layers, which the cycles in a graph would keep alive for some time."""
        for node in itertools.chain(*self.nodes.values()):
            node.meta.clear()

    def _hide(self, owner: nn.Module, error: str) -> None:
        """All that a forward that is not understood may call by itself."""
        why = f"forward of {self.names[owner]} ({type(owner).__name__}) cannot be traced: {error}"
        for name, child in owner.named_children():
            if not child._modules or not _is_called_whole(owner, name):
                self.hidden.update(dict.fromkeys(child.modules(), why))

    def partner(self, norm: nn.Module) -> tuple[nn.Module | None, bool, tuple[nn.Module, ...], str]:
        """The activation to fuse with, whether it comes first, and all norms that share it, this
        one among them; or None, and why."""
        if norm in self.hidden:
            return None, False, (), self.hidden[norm]
        if norm not in self.nodes:
            return None, False, (), "no forward calls it"
        reasons = []
        for first, beside, back in ((False, _next, _previous), (True, _previous, _next)):
            found = [beside(node) for node in self.nodes[norm]]
            activation = next((m for m in found if type(m) in _ACTIVATIONS), None)
            if activation is None:
                continue
            place = f"{'preceded' if first else 'followed'} by {self.names[activation]}"
            sharing = tuple(dict.fromkeys(back(node) for node in self.nodes[activation]))
            if any(m is not activation for m in found):
                reasons.append(f"{place}, but not wherever it is used")
            elif activation in self.hidden:
                reasons.append(f"{place}; {self.hidden[activation]}")
            elif not all(self._always_goes_to(m, activation, beside) for m in sharing):
                reasons.append(
                    f"{place}, which has other uses too: give it an activation of its own"
                )
            elif unfit := _unfit(activation):
                reasons.append(f"{place}, which cannot be fused: {unfit}")
            elif first and any(n.next not in n.users for n in self.nodes[activation]):
                reasons.append(f"{place}, with something else done in between")
            elif first and activation.inplace and not all(map(_owns_input, self.nodes[activation])):
                reasons.append(f"{place}, in place on what others may see")
            else:
                return activation, first, sharing, ""
        return None, False, (), (reasons or [_describe(self.nodes[norm])])[0]

    def _always_goes_to(
        self, norm: nn.Module | None, activation: nn.Module, beside: Callable[..., object]
    ) -> bool:
        """Whether this is a BatchNorm that can be fused, with this activation wherever it is."""
        if type(norm) not in _NORMS or norm in self.hidden or _unfit(norm):
            return False
        return all(beside(node) is activation for node in self.nodes[norm])


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own modules that call the one they hold as a whole."""
    compiled = "_orig_mod" in module._modules
    return compiled or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _next(node: fx.Node) -> nn.Module | None:
    """The module that gets the result of this call, where it is the only one to get it."""
    users = list(node.users)
    if len(users) != 1 or users[0].args != (node,) or users[0].kwargs:
        return None
    if users[0].meta["grad"] != node.meta["grad"]:  # one of them is under torch.no_grad()
        return None
    return users[0].meta.get("module")


def _previous(node: fx.Node) -> nn.Module | None:
    """The module whose result this call gets, as the only one."""
    before = node.args[0] if node.args else None
    if isinstance(before, fx.Node) and _next(before) is not None:
        return before.meta.get("module")
    return None


def _owns_input(node: fx.Node) -> bool:
    """Whether a call gets a tensor that was made for it alone, not a view of something."""
    return isinstance(_previous(node), (_ConvNd, nn.Linear))


def _describe(nodes: list[fx.Node]) -> str:
    """Why the result of these calls does not go into one activation."""
    for node in nodes:
        users = list(node.users)
        if len(users) != 1:
            return f"its output is used {len(users)} times"
        if users[0].op == "output":
            return "its output leaves the module that calls it"
        if "module" in users[0].meta:
            continue
        name = getattr(users[0].target, "__name__", users[0].target)
        if name.rstrip("_") in ("relu", "leaky_relu"):
            return f"followed by {name} as a function: as a module it would be fused"
        return f"followed by {name}"
    return f"followed by {type(next(iter(nodes[0].users)).meta['module']).__name__}"


# ---- tracing -----------------------------------------------------------------------------------

_MOST_CHOICES = 12  # tests of a tensor, or of its shape, on one way through a forward
_MOST_WAYS = 64
_MOST_ARGUMENTS = 5
_TYPES = "it may depend on the types of layers or arguments"


class _UntraceableError(Exception):
    pass


class _Tracer(fx.Tracer):
    """Takes given branches where the code asks a tensor (or an argument) for a decision."""

    proxy_buffer_attributes = True  # so that nothing is computed, and no buffer written to

    def __init__(self, choices: list[bool]) -> None:
        super().__init__()
        self.choices = choices
        self.chosen: list[bool] = []

    def create_node(self, *args: object, **options: object) -> fx.Node:
        node = super().create_node(*args, **options)
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        i = len(self.chosen)
        if i == _MOST_CHOICES:
            raise _UntraceableError("it decides by values too often")
        self.chosen.append(self.choices[i] if i < len(self.choices) else True)
        return self.chosen[-1]


def _traces(owner: nn.Module) -> list[fx.Graph]:
    """The module's forward with its children as black boxes: in training and evaluation, with
    and without each argument, along every branch."""
    if "forward" in vars(owner):
        raise _UntraceableError("it is replaced")
    if _asks_for_types(type(owner)):
        raise _UntraceableError(_TYPES)
    if _catches_errors(type(owner)):
        raise _UntraceableError("it catches exceptions")
    arguments = list(inspect.signature(type(owner).forward).parameters.values())[2:]
    arguments = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if len(arguments) > _MOST_ARGUMENTS:
        raise _UntraceableError("it has too many arguments")
    graphs = []
    for training, *given in itertools.product((True, False), repeat=1 + len(arguments)):
        missing = [a for a, there in zip(arguments, given, strict=True) if not there]
        try:
            owner.training = training
            graphs += _branches(owner, {a.name: None for a in missing})
        except _UntraceableError:
            if all(a.default is None for a in missing):  # or this one is never left out
                raise
    if not graphs:
        raise _UntraceableError("it raises an error")
    return graphs


def _branches(owner: nn.Module, concrete: dict[str, None]) -> list[fx.Graph]:
    graphs, pending, ways = [], [[]], 0
    while pending:
        ways += 1
        if ways > _MOST_WAYS:
            raise _UntraceableError("it has too many branches")
        tracer = _Tracer(pending.pop())
        try:
            graphs.append(tracer.trace(owner, concrete))
        except _UntraceableError:
            raise
        except Exception as error:
            if not _is_raised_by_forward(error):
                message = str(error).strip().splitlines() or [""]
                raise _UntraceableError(f"{type(error).__name__}: {message[0]}") from error
        for i in range(len(tracer.choices), len(tracer.chosen)):
            pending.append([*tracer.chosen[:i], False])
    return graphs


def _is_raised_by_forward(error: Exception) -> bool:
    """Whether the user's own code refuses its input, by `raise` or `assert`."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_code
    by_torch = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "torch"
    return not by_torch and dis.opname[code[trace.tb_lasti]] == "RAISE_VARARGS"


# ---- reading source, where tracing does not do ---------------------------------------------------


def _methods(cls: type) -> list[Callable[..., object]]:
    """``forward`` and the class's other methods that it may call, by their names."""
    found, pending = {}, ["forward"]
    while pending:
        name = pending.pop()
        versions = [vars(c)[name] for c in cls.__mro__ if c is not nn.Module and name in vars(c)]
        for version in versions:
            method = inspect.unwrap(getattr(version, "fget", version))
            if not inspect.isfunction(method) or method in found:
                break
            found[method] = names_in(method.__code__)
            pending += found[method]
            if "super" not in found[method]:
                break
    return list(found)


def _asks_for_types(cls: type) -> bool:
    """Such code sees proxies instead of tensors, and would see other layers when they are fused."""
    asking = {"isinstance", "issubclass", "type"}
    return any(asking & names_in(method.__code__) for method in _methods(cls))


def _catches_errors(cls: type) -> bool:
    """Such code may go another way with tensors than it does when a trace fails in it."""
    return any(
        instruction.opname.endswith("EXC_MATCH")
        for method in _methods(cls)
        for instruction in dis.get_instructions(method)
    )


_TAKE_WHOLE = {"checkpoint", "data_parallel"}
_TAKE_NOTHING = {"buffers", "named_buffers", "named_parameters", "parameters", "state_dict"}
_TAKE_ANY = {"_modules", "children", "get_submodule", "getattr", "named_children"}


def _is_called_whole(owner: nn.Module, child: str) -> bool:
    """Whether the source of a module calls a child, and does nothing else with it."""
    called = False
    for method in _methods(type(owner)):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            return False
        if _TAKE_ANY & names_in(method.__code__):
            return False
        fine = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                fine.add(node.func)
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                fine.update(node.args if name in _TAKE_WHOLE else ())
            elif isinstance(node, ast.Attribute) and node.attr in _TAKE_NOTHING:
                fine.add(node.value)
        uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == child]
        if not fine.issuperset(uses):
            return False
        called = called or bool(uses)
    return called
