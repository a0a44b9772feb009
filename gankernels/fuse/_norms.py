"""Fuses norms with activations."""

from __future__ import annotations

import itertools

from torch import nn

from gankernels import nn as fused
from gankernels.fuse._calls import Calls, Pair, unfit
from gankernels.fuse._trace import DEPENDS_ON_TYPES
from gankernels.nn.batch_norm_leaky_relu import LeakyReLUSyncBatchNorm, SyncBatchNormLeakyReLU
from gankernels.nn.pairs import pair

# The layer for BatchNorm first, and the one for the activation first.
_LAYERS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: (fused.BatchNormLeakyReLU1d, fused.LeakyReLUBatchNorm1d),
    nn.BatchNorm2d: (fused.BatchNormLeakyReLU2d, fused.LeakyReLUBatchNorm2d),
    nn.BatchNorm3d: (fused.BatchNormLeakyReLU3d, fused.LeakyReLUBatchNorm3d),
    nn.SyncBatchNorm: (SyncBatchNormLeakyReLU, LeakyReLUSyncBatchNorm),
}
FUSED = tuple(itertools.chain(*_LAYERS.values()))
PAIR = Pair(main=tuple(_LAYERS), other=(nn.LeakyReLU, nn.ReLU))


def rewrite(norms: list[nn.Module], calls: Calls, lone: bool) -> list[str]:
    """Fuse norms with the activations next to them; returns a line for each, in their order."""
    names = calls.names
    lines = []
    activations: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        why = ""
        if norm not in activations:
            if reason := unfit(norm, PAIR.main):
                lines.append(f"left {names[norm]}: {reason}")
                continue
            match = calls.match(norm, PAIR)
            if isinstance(match, str):
                why = match
            else:
                cls = {n: _LAYERS[type(n)][match.other_first] for n in match.sharing}
                pair(cls, match.other)
                activations.update(dict.fromkeys(match.sharing, match.other))
        if norm in activations:
            lines.append(f"fused {names[norm]} with {names[activations[norm]]}: {norm}")
        elif lone and not why.endswith(DEPENDS_ON_TYPES):
            pair({norm: _LAYERS[type(norm)][0]}, None)
            lines.append(f"fused {names[norm]} alone ({why}): {norm}")
        else:
            lines.append(f"left {names[norm]}: {why}")
    return lines
