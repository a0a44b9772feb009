"""Settings as fields of frozen dataclasses, with a line of help each."""

from __future__ import annotations

import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from numbers import Real
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field of a settings class, with the line that `train --help` prints for it."""
    return field(default=default, metadata={"help": help})


def names(cls: type) -> set[str]:
    """The names of the settings of a class."""
    return {f.name for f in fields(cls) if "help" in f.metadata}


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(name, default, help) of every setting of a class."""
    rows = []
    for f in fields(cls):
        if "help" in f.metadata:
            assert f.default is not MISSING, f"{cls.__name__}.{f.name} has no default"
            rows.append((f.name, str(f.default), f.metadata["help"]))
    return rows


def fill(cls: type[T], settings: Mapping[str, Any], **more: Any) -> T:
    """An instance of a settings class; values may be text. Names of other classes are ignored."""
    hints = typing.get_type_hints(cls)
    known = names(cls) & settings.keys()
    return cls(**{name: coerce(name, settings[name], hints[name]) for name in known}, **more)


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value`, or the text of one, as an int, float, bool or str, or None, as `hint` says."""
    if isinstance(hint, types.UnionType):
        if value is None or value == "none":
            return None
        (hint,) = (member for member in hint.__args__ if member is not type(None))
    try:
        if hint is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if hint is str:
            return os.fspath(value)
        if not isinstance(value, (str, Real)) or isinstance(value, bool) != (hint is bool):
            raise ValueError
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        number = hint(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        kinds = {int: "a whole number", float: "a number", bool: "true or false"}
        kind = kinds.get(hint, "text")
        raise ValueError(f"{name} must be {kind}, got {reprlib.repr(value)}") from None
    if hint is int and abs(number) >= 2**64:
        raise ValueError(f"{name} must fit into 64 bits, got {reprlib.repr(value)}")
    if hint is float and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {reprlib.repr(value)}")
    return number
