"""Makes a trainer from settings, as the command line does."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gankernels import data, games
from gankernels._console import warn
from gankernels._devices import choose_device
from gankernels._files import read_json
from gankernels._memory import require
from gankernels._options import coerce
from gankernels._paths import expand
from gankernels.data import Spec
from gankernels.games import BareOptions, Game
from gankernels.train.blueprint import activation_bytes, blueprint, weight_bytes
from gankernels.train.checkpoint import checkpoints, read
from gankernels.train.config import RESUMABLE, Config, configure, from_dict, to_dict
from gankernels.train.trainer import Trainer


def start(game: str | Path, *, resume: bool = False, **settings: Any) -> Trainer:
    """Read the data, build the game and its trainer, and with `resume` load the last checkpoint.

    Args:
        game: the name of a game, or a config.json to run again.
        resume: continue the run in the folder `out`, or start one if there is none. Settings that
            do not change the results may differ then (`config.RESUMABLE`), and so may the path of
            the data, which are recognized by their content.
        settings: fields of `Config`, of the game's options and of the options of the kind of data,
            as values or as text.

    Raises:
        ValueError: an unknown game or setting, a folder that already holds a run (without
            `resume`), or a setting that a resumed run cannot change.
        CheckpointError: the newest checkpoint is damaged or belongs to something else.
    """
    name = str(game)
    if name.endswith(".json"):
        path = expand(name)
        stored = from_dict(read_json(path), path)
        name = stored.pop("game")
        settings = {**stored, **settings}
    game_class = games.get(name)
    for key in {"data", "out"} & settings.keys():  # paths are checked before the rest
        settings[key] = coerce(key, settings[key], str)
        if not settings[key]:
            raise ValueError(f"{key} must name something, got ''")
    settings["out"] = run = expand(settings.get("out", f"runs/{name}"))
    if "data" in settings:
        settings["data"] = data.canonical(settings["data"])  # config.json works from any folder

    if (run / "config.json").exists() or checkpoints(run):
        if not resume:
            raise ValueError(
                f"{run} already holds a run: --resume continues it, --out chooses another folder"
            )
        settings = _continued(game_class, name, run, settings)
    config, options = configure(game_class, settings)

    found = checkpoints(run)
    if found and not data.exists(config.data):
        raise ValueError(
            f"data {config.data!r}, on which the run in {run} was trained, does not exist: "
            "give its new path with --data"
        )
    opened = data.load(config.data, **(vars(config.data_options) if config.data_options else {}))
    _require_memory(game_class, opened.spec, config, options)
    # The networks draw their first weights from the default generator.
    torch.manual_seed(config.seed)
    trainer = Trainer(game_class(opened.spec, options), opened, config)
    if found:
        trainer.load(found[-1])
    return trainer


def _require_memory(
    game_class: type[Game], spec: Spec, config: Config, options: BareOptions
) -> None:
    """Raises ValueError if the networks or a step are estimated to be larger than memory."""
    plan = blueprint(game_class, spec, options)
    if plan is None:
        return
    device = choose_device(config.device)
    networks = 2 * weight_bytes(plan)  # with the gradients
    require(networks, "the networks of these settings", device)
    share = config.batch_size // max(int(os.environ.get("WORLD_SIZE", "1")), 1)
    real = 4 * sum(math.prod(field.shape) for field in spec.values())  # decoded, in float32
    sample = real + activation_bytes(plan) // (1 if config.precision == "fp32" else 2)
    require(networks + share * sample, f"batch_size={config.batch_size}", device)


def _continued(
    game_class: type[Game], name: str, run: Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of the run in the folder, updated by the given ones that may change."""
    stored = _stored(game_class, name, run)
    if stored is None:
        return dict(given)
    if stored.pop("game") != name:
        raise ValueError(f"{run} holds a run of another game, not of {name}")
    # Compared after conversion, since given settings may be text.
    before = to_dict(name, *configure(game_class, stored))
    after = to_dict(name, *configure(game_class, {**stored, **given}))
    for key in (before.keys() & after.keys()) - RESUMABLE:
        if before[key] != after[key]:
            raise ValueError(
                f"{key} cannot change when a run is resumed: "
                f"{before[key]!r} in {run}, {after[key]!r} given"
            )
    return {**stored, **given}


def _stored(game_class: type[Game], game: str, run: Path) -> dict[str, Any] | None:
    """The settings of a run, from a checkpoint if config.json is damaged; None without either.

    The damaged file is not touched: the trainer overwrites it.
    """
    path, found = run / "config.json", checkpoints(run)
    try:
        stored = from_dict(read_json(path), path)
        if stored["game"] == game:
            values = {name: value for name, value in stored.items() if name != "game"}
            configure(game_class, values)
        return stored
    except (ValueError, TypeError, OSError) as error:
        instead = f"taking the settings from {found[-1].name}" if found else "starting a new run"
        warn(f"{error} ({path} cannot be used): {instead}")
    return from_dict(read(found[-1])["config"], found[-1]) if found else None
