"""Samples that show how a run gets on: the same ones every time."""

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
    """Write samples of a fixed seed to a file that shows the field they are of.

    In a class-conditional game columns of the grid are classes; other columns that samples are made
    from are the first of the data. The default generators are seeded, since a generator may draw
    more noise by itself.
    """
    field = game.spec[game.makes]
    given, columns = _given(game, batches)
    fixed = torch.Generator().manual_seed(seed)
    make_way(path)
    for rng in default_generators(batches.device):
        rng.manual_seed(seed)
    field.save(field.encode(game.sample(GRID, rng=fixed, **given)), path, columns)


def _given(game: Game, batches: Batches) -> tuple[dict[str, Any], int]:
    """The columns that samples are made from, and the number of columns of a grid of samples."""
    classes = list(range(game.num_classes)) if game.conditional else None
    labels, columns = arrange(GRID, classes)
    given: dict[str, Any] = {} if labels is None else {"labels": labels}
    return given | batches.first(set(game.given) - given.keys(), GRID), columns
