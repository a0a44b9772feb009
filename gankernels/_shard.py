"""Which part of a batch this process holds, for random numbers that belong to samples.

Processes that train together draw the same numbers for the whole batch and keep the rows of their
own samples, so that two of them with half a batch each do what one with all of it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_rank, _size = 0, 1


@contextmanager
def shard(rank: int, size: int) -> Iterator[None]:
    """Inside, this process holds part `rank` of `size` equal parts of every batch."""
    global _rank, _size
    before = _rank, _size
    _rank, _size = rank, size
    try:
        yield
    finally:
        _rank, _size = before


def per_sample(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """`draw(n)` for n samples of this process: drawn for the whole batch, the own rows kept."""
    if _size == 1:
        return draw(n)
    return draw(n * _size)[_rank * n : (_rank + 1) * n]
