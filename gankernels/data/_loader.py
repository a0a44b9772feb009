"""Random batches of data that do not fit onto the device, read ahead by other processes."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, util
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gankernels.data._columns import Data

#: Held while workers start, so that none is taken for one of another thread's loader.
_STARTING = threading.Lock()


class BatchLoader:
    """An endless iterator of random batches: raw columns ``(batch_size, ...)`` by name.

    Rows are drawn with replacement. Draw number k depends on ``seed`` and k alone, so that a loader
    with ``first=k`` goes on where another stopped, whatever their workers. PyTorch's random state
    is left alone.

    Workers are processes that prepare two batches each ahead of time. They leave SIGINT,
    SIGTERM and SIGHUP to the process that started them, which may want a last batch before it
    stops. Call :meth:`close` to end them; they also end with the loader and with the process.

    Args:
        data: tables in host memory or in files.
        batch_size: rows per draw, of every table.
        seed: of the draws, not negative.
        first: number of the first draw.
        part: (i, m): only the i-th of m equal parts of every batch is read and delivered.
        workers: processes that read rows; with 0 they are read when they are asked for.
        device: where the batches are delivered; on CUDA through pinned memory, without waiting.

    Iterating raises ValueError for a damaged file, naming it, and ChildProcessError after a worker
    was killed.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        seed: int,
        first: int = 0,
        part: tuple[int, int] = (0, 1),
        workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("first", first, 0),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        loader = DataLoader(
            _Draws(data, batch_size, seed, part),
            sampler=itertools.count(first),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_stop_signals,
            pin_memory=on_cuda,
            # Left out, the default generator would be drawn from: a resumed run would differ.
            generator=torch.Generator(),
        )
        # The thread that pins memory works on the device that is current now.
        current = torch.accelerator.device_index(self.device.index if on_cuda else None)
        with _STARTING, _sigchld_kept(), current:
            others = set(multiprocessing.active_children())
            self._items: Iterator[Any] = iter(loader)
            self._workers = [w for w in multiprocessing.active_children() if w not in others]
        # At exit multiprocessing would end them by SIGTERM and wait, for ever.
        self._end_workers = util.Finalize(self, _kill, args=(self._workers,), exitpriority=0)

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        try:
            drawn = next(self._items)
        except (RuntimeError, OSError, EOFError) as error:
            # A connection may break a moment before its process has ended.
            connection.wait([worker.sentinel for worker in self._workers], timeout=5)
            for worker in self._workers:
                if not worker.is_alive():
                    raise ChildProcessError(
                        f"a process that reads images ended with status {worker.exitcode}; if it "
                        "was killed for want of memory, use fewer workers or smaller batches"
                    ) from error
            raise
        if isinstance(drawn, ValueError):
            raise drawn
        return {name: raw.to(self.device, non_blocking=True) for name, raw in drawn.items()}

    def close(self) -> None:
        """End the workers. Iterating then stops at once."""
        self._items = iter(())  # the end of PyTorch's iterator asks them to leave
        self._end_workers()


class _Draws(Dataset[Any]):
    """Draw number k as item k: raw columns, or the ValueError that reading them raised.

    An error is a value here since an exception would arrive with a worker's traceback as its text.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, part: tuple[int, int]) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.part = part

    def __getitem__(self, k: int) -> dict[str, Tensor] | ValueError:
        columns: dict[str, Tensor] = {}
        part, parts = self.part
        for i, table in enumerate(self.data.tables):
            rng = np.random.default_rng((self.seed, k, i) if i else (self.seed, k))
            rows = torch.from_numpy(rng.integers(len(table), size=self.batch_size))
            try:
                columns |= table.read(rows.chunk(parts)[part])
            except ValueError as error:
                return error
        return columns


def _ignore_stop_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: list[multiprocessing.Process]) -> None:
    for worker in workers:
        worker.kill()
        worker.join()


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    """Undo what a DataLoader does to SIGCHLD: its handler raises wherever the program happens to
    be, in the middle of a checkpoint, say. Without it the next batch tells of a dead worker."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
