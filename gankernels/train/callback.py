"""The base class of callbacks, and the parts of a run that callbacks use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from gankernels.data import Data
from gankernels.games import Game
from gankernels.train.config import Config


class Run(Protocol):
    """The part of a `Trainer` that callbacks use."""

    config: Config
    game: Game
    data: Data
    device: torch.device
    run: Path
    step: int
    callbacks: list[Callback]

    def sampling(self) -> AbstractContextManager[Game]:
        """Inside, the game is in evaluation mode and has its averaged networks."""

    def stop(self) -> None:
        """End the run after this iteration, with a checkpoint."""

    def notify(self, event: str, *details: Any) -> None:
        """Call the method of that name of every callback."""


class Callback:
    """Methods that `Trainer.fit` calls; a subclass overrides those that it needs.

    All methods are called between two iterations, in the order in which the callbacks were given,
    only on the process that writes the run folder, and after a checkpoint that is due was saved.
    `trainer.stop()` ends the run early, with a checkpoint. An exception in a method does the same,
    and `fit` then raises it.
    """

    #: The name of a built-in callback's output. Such a callback cannot end a run: if it fails, a
    #: warning with this name is shown, and it is not called again.
    shows: str | None = None

    def on_start(self, trainer: Run) -> None:
        """Before the first iteration; a resumed run starts at `trainer.step`."""

    def on_step(self, trainer: Run) -> None:
        """After every iteration. Losses are still on the device: reading them here costs time."""

    def on_report(self, trainer: Run, values: dict[str, float]) -> None:
        """Every `log_every` iterations, and at the end: mean losses, `it_per_s`, scores."""

    def on_samples(self, trainer: Run, path: Path) -> None:
        """After a grid of samples was written to `path`."""

    def on_checkpoint(self, trainer: Run, path: Path) -> None:
        """After a checkpoint was written to `path`."""

    def on_end(self, trainer: Run) -> None:
        """At the end, also after an exception."""
