"""Reads archives of tensors without trusting them, and checks their content.

`torch.load(weights_only=True)` keeps a file from running code. It does not keep one from requesting
a terabyte, from blocking, or from containing an empty, expanded or sparse tensor where a kernel
expects memory of a certain size. This module checks for these, before any value is used.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankernels._files import open_regular

#: The names in the pickle of our archives. PyTorch allows more, such as bytearrays of any size.
NAMES = re.compile(r"torch._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")

#: Makes `conform` accept any value, which is checked elsewhere.
ANY = object()


def load(path: Path, device: str | torch.device = "cpu") -> Any:
    """Load a file of `torch.save`. A foreign or damaged file can raise any exception."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or claimed > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("its members claim to be larger than the file")
        # torch.load ignores the checksums: it would load a flipped bit as a weight.
        if spoiled := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {spoiled}")
        for member in members:
            if member.filename.endswith(".pkl"):
                for opcode, argument, _ in pickletools.genops(archive.read(member)):
                    if opcode.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
                        raise zipfile.BadZipFile(f"it wants {str(argument).replace(' ', '.')}")
    return torch.load(path, map_location=device, weights_only=True)


def conform(value: Any, like: Any, name: str) -> None:
    """Raises ValueError unless `value` has the structure of `like`.

    That is: mappings have the same keys, sequences have the same length, numbers are finite, and
    tensors have the same dtype, shape and layout, and memory for all their elements.
    """
    if like is ANY:
        return
    if isinstance(like, Mapping):
        if type(value) not in (dict, OrderedDict):  # subclasses could override methods
            raise ValueError(f"{name} must be a mapping, got {_kind(value)}")
        if missing := like.keys() - set(value):
            raise ValueError(f"{name} lacks {_some(missing)}")
        if foreign := set(value) - like.keys():
            raise ValueError(f"{name} has {_some(foreign)}, which does not belong there")
        for key, member in like.items():
            conform(value[key], member, f"{name}.{key}")
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ValueError(f"{name} must be a sequence of {len(like)}, got {_kind(value)}")
        for i, (part, member) in enumerate(zip(value, like, strict=True)):
            conform(part, member, f"{name}[{i}]")
    elif isinstance(like, Tensor):
        if not isinstance(value, Tensor) or _form(value) != _form(like):
            raise ValueError(f"{name} must be {_kind(like)}, got {_kind(value)}")
        if _is_dense(like) and not _is_dense(value):
            raise ValueError(f"{name} must have memory of its own for every element")
    elif type(like) in (int, float):
        if type(value) not in (int, type(like)):
            raise ValueError(f"{name} must be a number, got {_kind(value)}")
        if not (abs(value) < 2**63 if type(value) is int else math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number of 64 bits, got {_kind(value)}")
    elif type(value) is not type(like):
        raise ValueError(f"{name} must be {_kind(like)}, got {_kind(value)}")


def conform_optimizer(value: Any, like: Mapping[str, Any], name: str, begun: bool) -> None:
    """`conform` for the `state_dict()` of an optimizer: `like` is the state after a step.

    A parameter has no state until it has had a gradient, and flags that newer versions of PyTorch
    added may be missing. Unknown entries of a state are ignored.
    """
    conform(_common(value, like), dict.fromkeys(like, ANY), name)
    groups, states = value["param_groups"], value["state"]
    conform(groups, [ANY] * len(like["param_groups"]), f"{name}.param_groups")
    for i, (group, own) in enumerate(zip(groups, like["param_groups"], strict=True)):
        flags = {key: flag for key, flag in own.items() if flag is None or type(flag) is bool}
        where = f"{name}.param_groups[{i}]"
        part = _common(group, own)
        conform({**flags, **part} if type(part) is dict else part, own, where)
        if group["params"] != own["params"]:
            raise ValueError(f"{where}.params must be {reprlib.repr(own['params'])}")
    if type(states) is not dict or not set(states) <= like["state"].keys():
        raise ValueError(f"{name}.state must be a mapping of parameters' numbers")
    if begun and like["state"] and not states:
        raise ValueError(f"{name}.state lacks every parameter")
    for i, state in states.items():
        own = like["state"][i]
        conform(_common(state, own), own, f"{name}.state[{i}]")


def _common(value: Any, like: Mapping[Any, Any]) -> Any:
    """The part of a mapping whose keys `like` has too; any other value unchanged."""
    plain = type(value) in (dict, OrderedDict)
    return {key: value[key] for key in like if key in value} if plain else value


def _is_dense(t: Tensor) -> bool:
    return t.layout == torch.strided and torch.empty_like(t, device="meta").stride() == t.stride()


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.layout


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {reprlib.repr(value)}"
    dtype, shape, layout = _form(value)
    how = "" if layout == torch.strided else f" ({layout})"
    return f"a tensor of {str(dtype).removeprefix('torch.')} {tuple(shape)}{how}"


def _some(names: set[Any]) -> str:
    shown = sorted(reprlib.repr(name) for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
