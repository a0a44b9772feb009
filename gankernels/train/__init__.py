"""Training: settings, the loop, checkpoints, logs, sample grids.

    trainer = Trainer(game, data, Config(out="runs/mine", steps=2000))
    trainer.fit()

or, all of it from settings as the command line does, `start("cgan", data="digits", ...)`.
"""

from gankernels.train.callback import Callback
from gankernels.train.checkpoint import CheckpointError, latest_checkpoint, load_game
from gankernels.train.config import Config
from gankernels.train.losses import DivergenceError
from gankernels.train.start import start
from gankernels.train.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointError",
    "Config",
    "DivergenceError",
    "Trainer",
    "latest_checkpoint",
    "load_game",
    "start",
]
