"""One file per GAN: its players, what each of them minimizes, and how to sample.

Every module in this directory whose name has no leading underscore is a GAN, and its name (with
`-` for `_`) is what the command line calls it: a new GAN is a new file, with no edit elsewhere.
Other packages add games by `register` or by an entry point of the group `gankernels.games`. Games
know nothing about loops, devices or precision; :mod:`gankernels.train` handles those.
"""

from __future__ import annotations

from gankernels.games._adversarial import (
    Adversarial,
    AdversarialOptions,
    DiscriminatorOptions,
)
from gankernels.games._game import (
    BareOptions,
    Batch,
    DataSpec,
    Game,
    Loss,
    Options,
    Player,
    option,
    registry,
)
from gankernels.games._round import Penalty, Round, adversary

__all__ = [
    "Adversarial",
    "AdversarialOptions",
    "BareOptions",
    "Batch",
    "DataSpec",
    "DiscriminatorOptions",
    "Game",
    "Loss",
    "Options",
    "Penalty",
    "Player",
    "Round",
    "adversary",
    "get",
    "names",
    "option",
    "register",
]


names = registry.names
"""The names of all games, sorted."""
get = registry.get
"""The game class of a name. Raises ValueError for an unknown one, with the names that exist."""
register = registry.register
"""Add a game class under a name, for this process."""
