"""Finds data sets in folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gankernels.data._files import visible
from gankernels.data._kind import Kind, get_kind, kinds

#: Levels down to which a folder is searched: torchvision has up to three, EMNIST/raw/gzip.
DEPTH = 4


def search(
    place: Path,
    candidates: Iterable[type[Kind]] | None = None,
    training: bool = True,
    depth: int = DEPTH,
) -> list[tuple[type[Kind], Path]]:
    """The data sets in a folder and in the folders in it, each with its kind."""
    if candidates is None:
        candidates = [get_kind(name) for name in kinds()]
    candidates = list(candidates)
    found = [(kind, path) for kind in candidates for path in kind.find(place, training)]
    if depth:
        for entry in visible(place):
            if entry.is_dir():
                found += search(Path(entry), candidates, training, depth - 1)
    return list({path.resolve(): (kind, path) for kind, path in found}.values())
