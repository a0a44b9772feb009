"""The settings of a run: checked, written to config.json, overridden from the command line."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from gankernels.games import Game, Options, option

FORMAT = 1
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """How to train, whatever the game."""

    data: str = option("digits", "digits, a folder or a file")
    size: int | None = option(None, "resize images to size x size; as they are, digits to 28")
    channels: int | None = option(None, "1 (grey) or 3 (colour); as the images are")
    stream: bool = option(False, "read the files of an image folder when they are drawn")
    workers: int = option(2, "processes that read images which are not kept on the device")
    steps: int = option(5000, "iterations, each a step of every player")
    batch_size: int = option(64, "images per step")
    out: str = option("run", "folder of the run")
    seed: int = option(0, "of weights, noise and batches")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    precision: str = option("fp32", f"{', '.join(PRECISIONS)}: of activations; weights stay fp32")
    graph: bool = option(True, "on CUDA, replay whole iterations as graphs: same numbers, faster")
    ema: float = option(0.995, "decay of the generator's moving average, which samples; 0 for none")
    log_every: int = option(100, "steps between lines of metrics.jsonl")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    checkpoint_every: int = option(500, "steps between checkpoints; 0 for the last step only")
    keep: int = option(2, "checkpoints to keep, the newest")
    score: bool = option(False, "score samples at every checkpoint, and keep the best as best.pt")

    def __post_init__(self) -> None:
        at_least = {"steps": 1, "batch_size": 2, "log_every": 1, "keep": 1}
        at_least |= {"sample_every": 0, "checkpoint_every": 0, "seed": 0, "workers": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        # What PyTorch's counters and generators take.
        for name, most in {"steps": 2**63 - 1, "seed": 2**64 - 1}.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name something, got ''")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {self.precision!r}")


#: What may differ when a run is resumed: how long it runs, where it and its data lie, who reads
#: them and what it shows, not what it computes. (Trainer.load refuses data of other content, and
#: another kind of device, whose random numbers are others.)
RESUMABLE = {
    "data",
    "workers",
    "steps",
    "out",
    "device",
    "graph",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep",
    "score",
}


def configure(game: type[Game], settings: Mapping[str, Any]) -> tuple[Config, Options]:
    """Settings of a run from one flat mapping of names to values or to strings.

    What is missing takes the game's defaults, then the general ones. Raises ValueError for an
    unknown name (with the likely right one) and for a value that does not fit.
    """
    settings = {**game.defaults, **settings}
    known = {f.name for cls in (Config, game.Options) for f in fields(cls)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name)[:100], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown setting {reprlib.repr(name)}; {hint}")
    return _fill(Config, settings), _fill(game.Options, settings)


def to_dict(model: str, config: Config, options: Options) -> dict[str, Any]:
    """The flat mapping that config.json holds. The folder is not part of it: a run can move."""
    settings = {**vars(config), **vars(options)}
    del settings["out"]
    return {"format": FORMAT, "model": model, **settings}


def from_dict(content: Any, where: Path) -> dict[str, Any]:
    """The settings, `model` among them, in what was read from `where`. ValueError if foreign."""
    if not isinstance(content, dict) or not {"format", "model"} <= content.keys():
        raise ValueError(f"{where} is not a configuration of gankernels")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        found = reprlib.repr(content["format"])
        raise ValueError(f"{where} has format {found}, this version reads {FORMAT}")
    if not isinstance(content["model"], str):
        found = reprlib.repr(content["model"])
        raise ValueError(f"{where}: model must be the name of a game, got {found}")
    return {name: value for name, value in content.items() if name != "format"}


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """`["lr=1e-4"]` as a mapping. Raises ValueError for what has no `=`."""
    for assignment in assignments:
        if "=" not in assignment:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
    return dict(assignment.split("=", 1) for assignment in assignments)


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(name, default, help) of every field of a settings class."""
    rows = []
    for f in fields(cls):
        assert f.default is not MISSING, f"{cls.__name__}.{f.name} has no default"
        rows.append((f.name, str(f.default), f.metadata.get("help", "")))
    return rows


def _fill(cls: type, settings: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls) if f.name in settings]
    return cls(**{name: coerce(name, settings[name], hints[name]) for name in names})


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value`, or the text of one, as what `hint` says: int, float, bool or str, or None."""
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
        kind = {int: "a whole number", float: "a number", bool: "true or false"}
        kind = kind.get(hint, "text")
        raise ValueError(f"{name} must be {kind}, got {reprlib.repr(value)}") from None
    if hint is int and abs(number) >= 2**64:
        raise ValueError(f"{name} must fit into 64 bits, got {reprlib.repr(value)}")
    if hint is float and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {reprlib.repr(value)}")
    return number
