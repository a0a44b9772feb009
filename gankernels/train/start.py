"""From settings to a trainer that is ready to go: what the command line does before step one."""

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
from gankernels._paths import expand
from gankernels.data import Spec
from gankernels.games import BareOptions, Game
from gankernels.train.blueprint import activation_bytes, blueprint, weight_bytes
from gankernels.train.checkpoint import checkpoints, read
from gankernels.train.config import RESUMABLE, Config, coerce, configure, from_dict
from gankernels.train.trainer import Trainer

#: The size of the digits where none is asked for: that of MNIST, which the small networks fit.
DIGITS_SIZE = 28


def start(model: str | Path, *, resume: bool = False, **settings: Any) -> Trainer:
    """Read the data, build the game and its trainer, and go to where the run stopped.

    Args:
        model: the name of a game, or a config.json to run again.
        resume: continue the run in the folder `out`, or start it where there is none. What does
            not change what it computes may be another then (`config.RESUMABLE`), the place of the
            data too: they are known by their content.
        settings: fields of `Config` and of the game's options, as values or as text.

    Raises:
        ValueError: an unknown model or setting, a folder that already holds a run (without
            `resume`), or a setting that a resumed run cannot change.
        CheckpointError: the newest checkpoint is damaged or belongs to something else.
    """
    if str(model).endswith(".json"):
        path = expand(model)
        stored = from_dict(read_json(path), path)
        model = stored.pop("model")
        settings = {**stored, **settings}
    game_class = games.get(str(model))
    for name in {"data", "out"} & settings.keys():  # paths are looked at before the rest
        settings[name] = coerce(name, settings[name], str)
        if not settings[name]:
            raise ValueError(f"{name} must name something, got ''")
    settings["out"] = run = expand(settings.get("out", f"runs/{model}"))
    if "data" in settings:
        settings["data"] = data.absolute(settings["data"])  # config.json works from any folder

    if (run / "config.json").exists() or checkpoints(run):
        if not resume:
            raise ValueError(
                f"{run} already holds a run: --resume continues it, --out chooses another folder"
            )
        settings = _continued(game_class, str(model), run, settings)
    config, options = configure(game_class, settings)

    found = checkpoints(run)
    if found and config.data != "digits" and not expand(config.data).exists():
        raise ValueError(
            f"data {config.data!r}, on which the run in {run} was trained, is not there: "
            "--data says where it is now"
        )
    images = data.load(
        config.data, size=_size(config), channels=config.channels, stream=config.stream
    )
    _require_memory(game_class, images.spec, config, options)
    # The networks draw their first weights from the default generator.
    torch.manual_seed(config.seed)
    game = game_class(images.spec, options)
    trainer = Trainer(game, images, config)
    if found:
        trainer.load(found[-1])
    return trainer


def _require_memory(
    game_class: type[Game], spec: Spec, config: Config, options: BareOptions
) -> None:
    """Raises ValueError where the networks or a step are larger than memory, as far as known."""
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


def _size(config: Any) -> int | None:
    return DIGITS_SIZE if config.size is None and config.data == "digits" else config.size


def _continued(
    game_class: type[Game], model: str, run: Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of the run in the folder with those given now, where both may differ."""
    stored = _stored(game_class, model, run)
    if stored is None:
        return dict(given)
    if stored.pop("model") != model:
        raise ValueError(f"{run} holds a run of another model, not of {model}")
    # Compared after conversion, since what is given may be text.
    then = [vars(part) for part in configure(game_class, {**stored, "out": run})]
    now = [vars(part) for part in configure(game_class, {**stored, **given})]
    for before, after in zip(then, now, strict=True):
        for name in before.keys() - RESUMABLE:
            if before[name] != after[name]:
                raise ValueError(
                    f"{name} cannot change when a run is resumed: "
                    f"{before[name]!r} in {run}, {after[name]!r} given"
                )
    return {**stored, **given}


def _stored(game_class: type[Game], model: str, run: Path) -> dict[str, Any] | None:
    """The settings of a run, from a checkpoint where config.json is damaged; None without either.

    The file is left to the trainer, which writes it anew.
    """
    path, found = run / "config.json", checkpoints(run)
    try:
        stored = from_dict(read_json(path), path)
        if stored["model"] == model:
            values = {name: value for name, value in stored.items() if name != "model"}
            configure(game_class, values)
        return stored
    except (ValueError, TypeError, OSError) as error:
        instead = f"the settings are those of {found[-1].name}" if found else "the run begins anew"
        warn(f"{error} ({path} cannot be used): {instead}")
    return from_dict(read(found[-1])["config"], found[-1]) if found else None
