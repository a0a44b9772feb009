"""From settings to a trainer that is ready to go: what the command line does before step one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gankernels import data, games
from gankernels._paths import expand
from gankernels.games import DataSpec, Game
from gankernels.train.checkpoint import checkpoints
from gankernels.train.config import RESUMABLE, configure, from_dict
from gankernels.train.files import read_json
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
    settings["out"] = run = expand(settings.get("out", f"runs/{model}"))
    if "data" in settings and expand(settings["data"]).exists():
        # So that config.json works from any folder.
        settings["data"] = str(expand(settings["data"]).resolve())

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
    # The networks draw their first weights from the default generator.
    torch.manual_seed(config.seed)
    game = game_class(DataSpec(images.channels, images.size, images.num_classes), options)
    trainer = Trainer(game, images, config)
    if found:
        trainer.load(found[-1])
    return trainer


def _size(config: Any) -> int | None:
    return DIGITS_SIZE if config.size is None and config.data == "digits" else config.size


def _continued(
    game_class: type[Game], model: str, run: Path, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of the run in the folder with those given now, where both may differ."""
    stored = from_dict(read_json(run / "config.json"), run / "config.json")
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
