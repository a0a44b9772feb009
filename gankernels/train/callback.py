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
    """The run as callbacks see it: a `Trainer`."""

    config: Config
    game: Game
    data: Data
    device: torch.device
    run: Path
    step: int
    callbacks: list[Callback]

    def sampling(self) -> AbstractContextManager[Game]:
        """The game in evaluation mode with its averaged networks."""

    def stop(self) -> None:
        """End the run after this iteration, saved as always."""

    def notify(self, event: str, *details: Any) -> None:
        """Call the method of that name of every callback."""


class Callback:
    """Methods that `Trainer.fit` calls; a subclass overrides those that it needs.

    All methods are called between two iterations, in the order in which the callbacks were given,
    on the process that writes the run folder only, after what is due was saved. `trainer.stop()`
    ends the run early, saved as always. So does what a method raises, and `fit` then raises it.
    """

    #: What a built-in callback shows. It cannot end a run: if it fails, a warning names it by this,
    #: and it is not called again.
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
