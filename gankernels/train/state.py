"""The state that a run needs to continue bit for bit, and how it is saved and loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gankernels import _archive as archive
from gankernels._paths import expand
from gankernels._random import default_generator
from gankernels._threads import threads
from gankernels.data import Data
from gankernels.games import Game, Player
from gankernels.train import checkpoint
from gankernels.train.averages import MovingAverages
from gankernels.train.batches import Batches
from gankernels.train.config import Config, to_dict
from gankernels.train.ranks import Ranks


class State:
    """The state that training changes; a `Trainer` adds the training loop."""

    config: Config
    device: torch.device
    ranks: Ranks
    data: Data
    identity: str
    batches: Batches
    rng: torch.Generator
    game: Game
    players: list[Player]
    parameters: dict[str, list[nn.Parameter]]
    optimizers: dict[str, torch.optim.Optimizer]
    schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler]
    scalers: dict[str, torch.amp.GradScaler]
    ema: MovingAverages
    step: int

    def optimizer_of(self, player: Player, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer like the player's own, for other parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define optimizer_of()")

    def settings(self) -> dict[str, Any]:
        """The content of config.json."""
        return to_dict(self.game.name, self.config, self.game.options)

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: all that is needed to continue bit for bit."""
        return {
            "config": self.settings(),
            "spec": self.game.spec.to_dict(),
            "rows": [len(table) for table in self.data.tables],
            "identity": self.identity,
            "device": self.device.type,
            "threads": threads(),
            "resident": self.batches.resident,
            "game": self.game.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "schedulers": {name: s.state_dict() for name, s in self.schedulers.items()},
            "scalers": {name: s.state_dict() for name, s in self.scalers.items()},
            "ema": {name: average.state_dict() for name, average in self.ema.items()},
            "draws": self.batches.drawn,
            "rng": self.rng.get_state(),
            "default_rng": self.ranks.gather(default_generator(self.device).get_state()),
        }

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint of this game, bit for bit.

        With another number of processes dropout draws other random numbers; with another number of
        threads results differ by rounding, and there is a warning.

        Raises:
            CheckpointError: the file cannot be used, or it is of other data: of another number,
                size or other classes, or of other content. Their path does not matter.
        """
        path = expand(path)
        content = checkpoint.read(path, self.device)
        checkpoint.check_data(content, self.data, self.identity, path)
        if content["device"] != self.device.type:
            raise checkpoint.CheckpointError(
                f"{path} was written on {content['device']}, whose random numbers cannot continue "
                f"on {self.device.type}: resume with --device {content['device']}"
            )
        if content["optimizers"].keys() != self.optimizers.keys():
            raise checkpoint.CheckpointError(f"{path} is of another game than {self.game.name}")
        self._check(content, path)
        checkpoint.load_state(self.game, content["game"], path)
        for name, average in self.ema.items():
            checkpoint.load_state(average, content["ema"][name], path)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
            self.scalers[name].load_state_dict(content["scalers"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(content["schedulers"][name])
        self.rng.set_state(content["rng"].cpu())
        states = content["default_rng"]
        if len(states) == self.ranks.size:
            default_generator(self.device).set_state(states[self.ranks.rank].cpu())
        else:
            torch.manual_seed(hash((self.config.seed, content["step"], self.ranks.rank)))
        self.step, self.batches.drawn = content["step"], content["draws"]
        if content["resident"] != self.batches.resident:
            self.batches.place(content["resident"])
        if content["threads"] != threads() and self.device.type == "cpu":
            warnings.warn(
                f"{path} was written with {content['threads']} threads, now there are {threads()}: "
                "results will differ by rounding from those of an uninterrupted run",
                stacklevel=3,
            )
        self.batches.close()

    def _check(self, content: dict[str, Any], path: Path) -> None:
        """Raises CheckpointError unless all states can be used. Changes nothing."""
        checkpoint.compare(self.game, content["game"], path)
        if content["ema"].keys() != self.ema.keys():
            raise checkpoint.CheckpointError(
                f"{path}: ema must be of {list(self.ema)}, got {list(content['ema'])}"
            )
        for name, average in self.ema.items():
            checkpoint.compare(average, content["ema"][name], path)
        rngs, rng = (content["rng"], *content["default_rng"]), self.rng.get_state()
        scalers = {name: scaler.state_dict() for name, scaler in self.scalers.items()}
        with checkpoint.checking(path):
            archive.conform(rngs, [rng] * len(rngs), "rng")
            archive.conform(content["scalers"], scalers, "scalers")
        for state in rngs:
            with checkpoint.rehearsing(path, "rng"):
                torch.Generator(self.device).set_state(state.cpu())
        for player in self.players:
            self._rehearse(player, content, path)

    def _rehearse(self, player: Player, content: dict[str, Any], path: Path) -> None:
        """Load the states of a player's optimizer, scaler and scheduler into throwaway copies."""
        name = player.name
        parameters = [nn.Parameter(torch.zeros_like(p)) for p in self.parameters[name]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer, state = self.optimizer_of(player, parameters), content["optimizers"][name]
        optimizer.step()
        with checkpoint.checking(path):
            archive.conform_optimizer(
                state, optimizer.state_dict(), f"optimizers.{name}", content["step"] > 0
            )
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.scalers[name].is_enabled())
        with checkpoint.rehearsing(path, f"the state of player {name!r}"):
            scaler.load_state_dict(content["scalers"][name])
            scaler.scale(torch.zeros((), device=self.device))
            optimizer.load_state_dict(copy.deepcopy(state))  # it may write to its argument
            optimizer.step()
            if player.schedule is not None:
                scheduler = player.schedule(optimizer)
                scheduler.load_state_dict(copy.deepcopy(content["schedulers"][name]))
                scheduler.step()
