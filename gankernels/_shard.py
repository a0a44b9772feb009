"""The part of a batch that this process holds, for random numbers that belong to samples.

Processes that train together draw the same numbers for the whole batch and keep the rows of their
own samples, so that two processes with half a batch each compute the same as one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class _Part(threading.local):
    """The part of this thread, since another one may sample, or train something else, meanwhile."""

    rank, size = 0, 1


_part = _Part()
# The number of threads that hold only a part. It is global since torch.compile guards on globals,
# but not on thread-local values: code compiled for whole batches is recompiled for parts.
_sharing = 0
_lock = threading.Lock()


@contextmanager
def shard(rank: int, size: int) -> Iterator[None]:
    """Inside, this thread holds part `rank` of `size` equal parts of every batch."""
    before = _part.rank, _part.size
    _part.rank, _part.size = rank, size
    _count(size > 1)
    try:
        yield
    finally:
        _part.rank, _part.size = before
        _count(-(size > 1))


def _count(change: int) -> None:
    global _sharing
    with _lock:
        _sharing += change


def per_sample(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """`draw(n)` for n samples of this process: draws for the whole batch, and keeps its rows."""
    if not _sharing or _part.size == 1:
        return draw(n)
    return draw(n * _part.size)[_part.rank * n : (_part.rank + 1) * n]
