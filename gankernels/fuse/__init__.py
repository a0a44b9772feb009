"""Replaces pairs of layers in an existing network by fused layers, and reverts this.

The order of layers is read from the code: every module that holds such layers is traced by
torch.fx, with its children as black boxes, once for every path through its ``forward``. A pair is
fused if all uses of both layers, in all traces, are uses of the pair. Every module therefore
computes the same as before, whatever code calls it.

Layers change their class in place, as with PyTorch's own ``fully_shard``, ``LazyModule`` and
``parametrize``: they stay the same objects, with their parameters, buffers, state_dict keys and
modes, so existing references remain valid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gankernels._restore import as_it_was
from gankernels.fuse import _cpu, _norms
from gankernels.fuse._calls import Calls
from gankernels.nn._rewrite import revert

__all__ = ["fuse", "unfuse"]


def fuse(
    module: nn.Module,
    *,
    lone: bool = False,
    cpu: bool = False,
    log: Callable[[str], object] | None = None,
) -> nn.Module:
    """Replace BatchNorm + LeakyReLU pairs in a network by fused layers, in place.

    A pair is a BatchNorm followed by LeakyReLU or ReLU, or one of these followed by a BatchNorm, in
    an ``nn.Sequential`` or as attributes that a ``forward`` calls one after the other. One
    activation may serve several BatchNorms if nothing else uses it. The BatchNorm becomes a
    :class:`gankernels.nn.BatchNormLeakyReLU2d` (or its relative), the activation an identity.
    Parameters, buffers and the keys of ``state_dict()`` stay the same, so optimizers and
    checkpoints from before remain valid. Results differ by rounding only. A SyncBatchNorm becomes a
    layer with ``sync=True`` and keeps its process group.

    Args:
        module: the whole network. A part is enough if no other part calls its layers.
        lone: whether to replace a BatchNorm without an activation too (by a slope of 1). This makes
            a gradient penalty faster, but not the forward pass of a small layer.
        cpu: whether to replace layers by those of :mod:`gankernels.nn.cpu` too, which are faster on
            a CPU: Linear, Dropout, nearest upsampling by 2 with the 3x3 Conv2d after it, and Conv2d
            from many channels to one. On other devices they change nothing.
        log: called with one line of text for every BatchNorm, and for every layer that ``cpu``
            concerns: how it was replaced, or why not. Pass ``print`` to show the lines,
            ``lines.append`` to keep them.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: if an argument has a wrong type, or ``module`` is compiled by TorchScript.

    The following are not replaced, and the log has the reason: layers with hooks, subclasses of
    PyTorch's layers, a BatchNorm whose output is used twice, an activation that has other uses too
    or is a function (``F.leaky_relu``), pairs that are divided between modules, an in-place
    activation whose input is visible elsewhere, and layers called by a ``forward`` that torch.fx
    cannot trace or whose source cannot be read. (An ``nn.Sequential`` in such a module is still
    analyzed if its owner only ever calls it as a whole.)

    By ``isinstance`` they are still a BatchNorm and an activation. They become two layers again,
    with a warning, when code needs two: when one of them is replaced or gets a hook, and when the
    BatchNorm is folded into a convolution or converted to another norm
    (``convert_sync_batchnorm``; to synchronize a fused layer, set its ``sync``).

    ``forward`` is analyzed in the state at the time of the call: if it depends on attributes other
    than ``training``, set them first. Code that calls one of the two layers from elsewhere, such as
    ``network.bn1(x)`` in a training loop, is not seen.

    The fused layers have two derivatives. For a third one, forward-mode derivatives or
    ``torch.vmap``, call :func:`unfuse` first.

    Example::

        gankernels.fuse(discriminator, log=print)
    """
    _check(module)
    for name, flag in (("lone", lone), ("cpu", cpu)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    if log is not None and not callable(log):
        raise TypeError(f"log must be callable, got {type(log).__name__}")
    names = {m: name or "module" for name, m in module.named_modules()}
    norms: list[nn.Module]
    norms = [m for m in names if isinstance(m, _BatchNorm) and not isinstance(m, _norms.FUSED)]
    wanted = {type(m) for m in norms}.intersection(_norms.PAIR.main)
    if cpu and any(type(m) is nn.Upsample for m in names):
        wanted |= {nn.Upsample}
    with Calls(names, wanted) as calls:
        if wanted:
            with as_it_was(module):
                calls.trace()
        lines = _norms.rewrite(norms, calls, lone)
        if cpu:
            lines += _cpu.rewrite(calls)
    if log is not None:
        for line in lines or ["no BatchNorm to fuse"]:
            log(line)
    return module


def unfuse(module: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place: every layer gets its former class back.

    Parameters, buffers and keys stay the same. It works on copies and unpickled networks too, and
    does not change layers that were not made by :func:`fuse`.

    Args:
        module: a network, or a part of one.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: if ``module`` is not a module.
    """
    _check(module)
    for layer in list(module.modules()):
        revert(layer)
    return module


def _check(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            "module must not be compiled by TorchScript, got a ScriptModule: fuse the module that "
            "it was made from"
        )
