"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> Path:
    """With ~ for a home folder, also where no shell has put it there."""
    return Path(os.path.expanduser(path))
