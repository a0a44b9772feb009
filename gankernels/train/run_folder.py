"""The folder of a run, which one process at a time may write to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gankernels._files import delete_leftovers, make_way, temporary_file, write_json
from gankernels.train import checkpoint
from gankernels.train.lock import RunLock


class RunFolder:
    """A run's folder.

    Args:
        path: the folder, created if it does not exist.
        settings: returns the content of config.json.
    """

    def __init__(self, path: Path, settings: Callable[[], dict[str, Any]]) -> None:
        self.path, self.settings = path, settings
        self.lock = RunLock(path)

    def take(self, step: int) -> None:
        """Lock the folder for a run at `step` and check that it can be written to.

        Raises ValueError if another process has it or if it holds a run beyond that step, and
        OSError if it cannot be written to: now, before there is work to lose.
        """
        self.lock.acquire()
        saved = checkpoint.checkpoints(self.path)
        if saved and (checkpoint.step_of(saved[-1]) or 0) > step:
            raise ValueError(
                f"{self.path} already holds a run beyond step {step}: "
                "load its latest checkpoint or choose another folder"
            )
        path = checkpoint.path_of(self.path, step)
        make_way(path)
        path.parent.mkdir(exist_ok=True)
        delete_leftovers(self.path, path.parent, self.path / "samples")
        with temporary_file(path.parent):
            pass
        self.write_settings()

    def release(self) -> None:
        """Unlock the folder."""
        self.lock.release()

    def write_settings(self) -> None:
        """Write config.json."""
        path = self.path / "config.json"
        make_way(path)
        write_json(path, self.settings())

    def save(self, step: int, content: dict[str, Any], keep: int) -> None:
        """Write a checkpoint. Raises ValueError if another process has taken the folder."""
        self.lock.check()
        make_way(checkpoint.path_of(self.path, step))
        checkpoint.save(self.path, step, content, keep)
