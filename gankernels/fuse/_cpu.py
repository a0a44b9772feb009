"""Replaces layers by faster ones for CPUs."""

from __future__ import annotations

from torch import nn

from gankernels.fuse._calls import Calls, Pair, unfit
from gankernels.nn._rewrite import become
from gankernels.nn.cpu import BitDropout, ConvToOneChannel2d, OneDNNLinear, UpsampleConv2d
from gankernels.nn.pairs import FusedUpsample

_ALONE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ConvToOneChannel2d,
    nn.Dropout: BitDropout,
    nn.Linear: OneDNNLinear,
}
_PAIR = Pair(main=(nn.Conv2d,), other=(nn.Upsample,), orders=(True,), suits=UpsampleConv2d.suits)


def rewrite(calls: Calls) -> list[str]:
    """Replace layers if possible; returns a line for every layer of these kinds."""
    lines = []
    for layer, name in calls.names.items():
        if isinstance(layer, nn.Upsample) and not isinstance(layer, FusedUpsample):
            lines.append(_upsampling(layer, calls))
        for kind, cls in _ALONE.items():
            if not isinstance(layer, kind) or isinstance(layer, (cls, UpsampleConv2d)):
                continue
            if isinstance(layer, nn.Conv2d) and not ConvToOneChannel2d.suits(layer):
                continue
            if why := _unfit_alone(layer, kind):
                lines.append(f"left {name}: {why}")
                continue
            become(layer, cls)
            lines.append(f"replaced {name}: {layer}")
    return lines


def _unfit_alone(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    if type(layer) is not kind:
        return f"{type(layer).__name__} is a subclass of {kind.__name__}"
    if "forward" in vars(layer):
        return "its forward is replaced"
    if isinstance(layer, nn.Dropout) and layer.inplace:
        return "it works in place"
    return None


def _upsampling(upsample: nn.Upsample, calls: Calls) -> str:
    name = calls.names[upsample]
    if why := unfit(upsample, _PAIR.other):
        return f"left {name}: {why}"
    if upsample in calls.hidden:
        return f"left {name}: {calls.hidden[upsample]}"
    conv = calls.following(upsample)
    if type(conv) is not nn.Conv2d:
        return f"left {name}: it is not followed by a Conv2d wherever it is used"
    match = calls.match(conv, _PAIR)
    if isinstance(match, str):
        return f"left {name}: {calls.names[conv]} is {match}"
    for sharing in match.sharing:
        become(sharing, UpsampleConv2d, upsample)
    become(upsample, FusedUpsample, *match.sharing)
    with_ = ", ".join(calls.names[m] for m in match.sharing)
    return f"fused {name} with {with_}: {match.sharing[0]}"
