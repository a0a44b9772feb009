"""Calls the callbacks of a run, and keeps their errors from harming it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gankernels._console import describe, warn
from gankernels.train.callback import Run


class Notifier:
    """The callbacks of a run.

    Attributes:
        failure: the first exception that a user's callback raised.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reset()

    def reset(self) -> None:
        """Enable callbacks that failed in an earlier `fit`."""
        self.failure: BaseException | None = None
        self._off: set[str | int] = set()

    def notify(self, event: str, *details: Any) -> None:
        """Call the method `event` of every callback.

        A built-in callback that fails is not called again. If a user's callback fails, the run ends
        after a checkpoint, and of that callback only `on_end` is still called.
        """
        for callback in list(self.run.callbacks):
            method = getattr(callback, event)
            if callback.shows is not None:
                self.attempt(callback.shows, method, self.run, *details)
            elif id(callback) not in self._off or event == "on_end":
                try:
                    method(self.run, *details)
                except (Exception, SystemExit) as error:
                    self._off.add(id(callback))
                    self.failure = self.failure or error
                    self.run.stop()

    def attempt(self, what: str, action: Callable[..., Any], *arguments: Any) -> None:
        """Do something that only displays the run: if it fails, warn, and do not try it again."""
        if what in self._off:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._off.add(what)
            warn(
                f"{self.run.run}: there is no {what} from step {self.run.step} on: "
                f"{describe(error)}"
            )
