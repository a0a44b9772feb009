"""The settings of a run: checked, written to config.json, overridden from the command line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gankernels._options import fill, names, option
from gankernels.data import DataOptions, Kind, Spec, kind_of
from gankernels.games import BareOptions, Game

FORMAT = 2
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Config:
    """How to train, whatever the game."""

    data: str = option("digits", "digits, a file or a folder; kind:PATH names its kind")
    workers: int = option(2, "data-loading processes (for data that are not kept on the device)")
    steps: int = option(5000, "iterations, each a step of every player")
    batch_size: int = option(64, "images per step")
    out: str = option("run", "folder of the run")
    seed: int = option(0, "random seed for weights, noise and batches")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    precision: str = option("fp32", f"of activations: {', '.join(PRECISIONS)} (weights stay fp32)")
    graph: bool = option(True, "replay whole iterations as CUDA graphs: same numbers, faster")
    ema: float = option(0.995, "EMA decay of the networks that make samples; 0 disables it")
    log_every: int = option(100, "steps between lines of metrics.jsonl")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    checkpoint_every: int = option(500, "steps between checkpoints; 0 for the last step only")
    keep: int = option(2, "checkpoints to keep, the newest")
    score: str | None = option(
        None, "metrics, such as frechet,accuracy, at every checkpoint; the first decides best.pt"
    )
    #: The settings with which the data are opened, an instance of their kind's `Options`.
    data_options: DataOptions | None = None

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


#: The settings that may differ when a run is resumed: how long it runs, where it and its data lie,
#: which processes read them and what it shows, but nothing that changes its results. (Trainer.load
#: refuses data of other content, and another kind of device, whose random numbers are others.)
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


def configure(game: type[Game], settings: Mapping[str, Any]) -> tuple[Config, BareOptions]:
    """Settings of a run from one flat mapping of names to values or to strings.

    They are those of `Config`, of the game and of the kind of the data. What is missing takes the
    game's defaults, then the general ones. Raises ValueError for an unknown name (with the likely
    right one) and for a value that does not fit.
    """
    settings = {**game.defaults, **settings}
    kind = _known_kind(str(settings.get("data", Config.data)))
    classes: list[type] = [Config, game.Options]
    if kind is not None:
        classes.append(kind.Options)
    known = {name for cls in classes for name in names(cls)}
    for name in settings:
        # Settings of data that were opened by other means, or are no longer there, are not known.
        if kind is not None and name not in known:
            close = difflib.get_close_matches(str(name)[:100], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown setting {reprlib.repr(name)}; {hint}")
    data_options = fill(kind.Options, settings) if kind else None
    config = fill(Config, settings, data_options=data_options)
    return config, fill(game.Options, settings)


def settle(config: Config, spec: Spec) -> Config:
    """The settings, those of the data as these turned out to be, so that config.json reruns them.

    The source of data that were opened by other means may be unknown: they have no settings.
    """
    options = config.data_options
    if options is None and (kind := _known_kind(config.data)):
        options = kind.Options()
    return replace(config, data_options=options.settled(spec)) if options else config


def _known_kind(source: str) -> type[Kind] | None:
    try:
        return kind_of(source)
    except (ValueError, OSError):
        return None


def to_dict(game: str, config: Config, options: BareOptions) -> dict[str, Any]:
    """The flat mapping that config.json holds. The folder is not part of it: a run can move."""
    parts = (config, config.data_options, options)
    settings = {name: value for part in parts if part for name, value in vars(part).items()}
    del settings["out"], settings["data_options"]
    return {"format": FORMAT, "game": game, **settings}


def from_dict(content: Any, where: Path) -> dict[str, Any]:
    """The settings, `game` among them, in what was read from `where`. ValueError if foreign."""
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{where} is not a configuration of gankernels")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        found = reprlib.repr(content["format"])
        raise ValueError(f"{where} has format {found}, this version reads {FORMAT}")
    if not isinstance(content.get("game"), str):
        found = reprlib.repr(content.get("game"))
        raise ValueError(f"{where}: game must be the name of a game, got {found}")
    return {name: value for name, value in content.items() if name != "format"}


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """`["lr=1e-4"]` as a mapping. Raises ValueError for text without `=`."""
    for assignment in assignments:
        if "=" not in assignment:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
    return dict(assignment.split("=", 1) for assignment in assignments)
