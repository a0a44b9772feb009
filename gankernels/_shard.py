"""Which part of a batch this process holds, for random numbers that belong to samples.

Processes that train together draw the same numbers for the whole batch and keep the rows of their
own samples, so that two of them with half a batch each do what one with all of it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class _Part(threading.local):
    """Of this thread: another one may sample, or train something else, meanwhile."""

    rank, size = 0, 1


_part = _Part()
# Threads that hold a part only. What torch.compile made while there was none is made again when
# there is one: it keeps an eye on a global number, but not on what belongs to a thread.
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
    """`draw(n)` for n samples of this process: drawn for the whole batch, the own rows kept."""
    if not _sharing or _part.size == 1:
        return draw(n)
    return draw(n * _part.size)[_part.rank * n : (_part.rank + 1) * n]
