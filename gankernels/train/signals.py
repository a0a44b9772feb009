"""Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, SIGINT, SIGTERM or SIGHUP sets `requested` instead of ending the process.

    A second SIGINT acts as usual: it raises KeyboardInterrupt, which damages no file. It counts as
    the second one only after half a second, since some tools send every signal twice. Repeated
    SIGTERM and SIGHUP have no further effect; SIGKILL ends a process at once. SIGHUP stays ignored
    if it already was, as under nohup. Outside the main thread signal handlers are not changed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    TWICE = 0.5

    def __init__(self) -> None:
        self.requested = False
        self._interrupted: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                previous = signal.getsignal(number)
                ignored = number == signal.SIGHUP and previous == signal.SIG_IGN
                if previous is not None and not ignored:  # None: not installed from Python
                    self._previous[number] = previous
                    signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > self.TWICE:
            self.__exit__()
            signal.raise_signal(number)
