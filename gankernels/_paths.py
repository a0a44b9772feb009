"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> Path:
    """Replaces ~ by a home folder, for paths that no shell has expanded."""
    return Path(os.path.expanduser(path))
