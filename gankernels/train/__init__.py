"""Training: settings, the loop, checkpoints, logs, sample grids.

    trainer = Trainer(game, data, Config(out="runs/mine", steps=2000))
    trainer.fit()

or, all of it from settings as the command line does, `start(model="cgan", data="digits", ...)`.
"""

from gankernels.train.checkpoint import CheckpointError, latest_checkpoint, load_game
from gankernels.train.config import Config
from gankernels.train.start import start
from gankernels.train.trainer import DivergenceError, Trainer

__all__ = [
    "CheckpointError",
    "Config",
    "DivergenceError",
    "Trainer",
    "latest_checkpoint",
    "load_game",
    "start",
]
