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

#: Held while workers start, so that a worker is not attributed to another thread's loader.
_STARTING = threading.Lock()


class BatchLoader:
    """An endless iterator of random batches: raw columns ``(batch_size, ...)`` by name.

    Rows are drawn with replacement. Draw number k depends on ``seed`` and k alone, so that a loader
    with ``first=k`` continues where another stopped, with any number of workers. PyTorch's random
    state is not changed.

    Workers are processes that prepare two batches each ahead of time. They ignore SIGINT, SIGTERM
    and SIGHUP, since the process that started them may need a last batch before it stops. Call
    :meth:`close` to end them; they also end with the loader and with the process.

    Args:
        data: tables in host memory or in files.
        batch_size: rows per draw, of every table.
        seed: the random seed of the draws, not negative.
        first: number of the first draw.
        part: (i, m): only the i-th of m equal parts of every batch is read and delivered.
        workers: the number of processes that read rows; with 0 rows are read on demand.
        device: the device of the batches; CUDA batches go through pinned memory, asynchronously.

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
            # Without it PyTorch draws from the default generator, and a resumed run would differ.
            generator=torch.Generator(),
        )
        # The thread that pins memory uses the device that is current now.
        current = torch.accelerator.device_index(self.device.index if on_cuda else None)
        with _STARTING, _sigchld_kept(), current:
            others = set(multiprocessing.active_children())
            self._items: Iterator[Any] = iter(loader)
            self._workers = [w for w in multiprocessing.active_children() if w not in others]
        # At exit multiprocessing would send them SIGTERM, which they ignore, and wait forever.
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
                        f"a data-loading worker died with status {worker.exitcode}; if it ran out "
                        "of memory, use fewer workers or smaller batches"
                    ) from error
            raise
        if isinstance(drawn, ValueError):
            raise drawn
        return {name: raw.to(self.device, non_blocking=True) for name, raw in drawn.items()}

    def close(self) -> None:
        """End the workers. Iterating then stops at once."""
        self._items = iter(())  # deleting PyTorch's iterator tells the workers to exit
        self._end_workers()


class _Draws(Dataset[Any]):
    """Draw number k as item k: raw columns, or the ValueError that reading them raised.

    Errors are returned as values, since a raised one would arrive with a traceback as its message.
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
    """Undo a DataLoader's handler of SIGCHLD, which raises at any place in the program, such as in
    the middle of a checkpoint. Without it, fetching the next batch reports a dead worker."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
