"""One file per GAN: who plays, what each player minimizes, how to sample.

Every module in this directory whose name has no leading underscore is a GAN, and its name (with
`-` for `_`) is what the command line calls it: a new GAN is a new file, with no edit elsewhere.
Games know nothing about loops, devices or precision; :mod:`gankernels.train` owns those.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from gankernels.games._adversarial import (
    Adversarial,
    AdversarialOptions,
    DiscriminatorOptions,
    Round,
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
)

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
    "Player",
    "Round",
    "get",
    "names",
    "option",
]


def names() -> list[str]:
    """The names of all games, sorted; `get(name)` returns the class."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def get(name: str) -> type[Game]:
    """The Game class that the module called `name` defines.

    Raises ValueError for an unknown name, with the names that exist.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown game {name!r}{hint} Available: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    (game,) = (
        member
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, Game)
        and member.__module__ == module.__name__
    )
    return game
