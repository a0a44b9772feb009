"""Sample grids that show the progress of a run, from the same noise every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gankernels._files import make_way
from gankernels._random import default_generators
from gankernels.data._pictures import arrange
from gankernels.games import Game
from gankernels.train.batches import Batches

#: Images in the grids that a run saves.
GRID = 80


def save_preview(game: Game, batches: Batches, seed: int, path: Path) -> None:
    """Write samples of a fixed seed to a file, in the format of their field.

    In a class-conditional game each column of the grid is a class. Other conditions are the first
    rows of the data. The default generators are seeded as well, since a network may draw noise from
    them.
    """
    field = game.spec[game.makes]
    given, columns = _given(game, batches)
    fixed = torch.Generator().manual_seed(seed)
    make_way(path)
    for rng in default_generators(batches.device):
        rng.manual_seed(seed)
    field.save(field.encode(game.sample(GRID, rng=fixed, **given)), path, columns)


def _given(game: Game, batches: Batches) -> tuple[dict[str, Any], int]:
    """The conditions that samples are made from, and the number of columns of the grid."""
    classes = list(range(game.num_classes)) if game.conditional else None
    labels, columns = arrange(GRID, classes)
    given: dict[str, Any] = {} if labels is None else {"labels": labels}
    return given | batches.first(set(game.given) - given.keys(), GRID), columns
