"""Whole training iterations, with our kernels and with PyTorch's ops."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gankernels as gk
from gankernels import train
from gankernels.bench.timing import Run
from gankernels.train import Trainer

#: Iterations between two readings of the losses; the default of `log_every`.
READ_EVERY = 100


@dataclass(frozen=True)
class Training:
    """A game and the settings that differ from `gankernels train GAME --data digits`."""

    game: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.game, *(f"{k}={v}" for k, v in self.settings.items())])


def trainings(quick: bool = False) -> list[Training]:
    """The default games: a penalty without batch norm, minibatch discrimination and, unless quick,
    a penalty through batch norm."""
    chosen = [Training("wgan-gp"), Training("cgan", {"minibatch_discrimination": "100,5"})]
    return chosen if quick else [*chosen, Training("dcgan", {"width": 16, "penalty": "r1"})]


def make_trainer(training: Training, device: str) -> Trainer:
    """A trainer that is ready to iterate and has written nothing.

    Raises:
        ValueError: an unknown game or setting.
        ImportError: the digits need scikit-learn.
    """
    settings = {"data": "digits", "log_every": 10**9, **training.settings}  # no norms, no reports
    with tempfile.TemporaryDirectory() as nowhere:
        return train.start(training.game, **{**settings, "out": nowhere, "device": device})


def contenders(training: Training, device: str) -> dict[str, Run]:
    """One iteration of each of two trainers in the same initial state: "eager" and "ours"."""

    def iterate(trainer: Trainer, backend: str) -> None:
        with gk.use_backend(backend):
            trainer.iterate()
        if trainer.step % READ_EVERY == 0:
            trainer.losses.take()

    backends = {"eager": "reference", "ours": "auto"}
    trainers = {name: make_trainer(training, device) for name in backends}
    return {name: partial(iterate, trainers[name], backends[name]) for name in backends}
