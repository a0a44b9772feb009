"""Batches for the training loop, from columns on the device or from processes that read ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gankernels.data import BatchLoader, Data, Table
from gankernels.games import Batch
from gankernels.train.config import Config
from gankernels.train.ranks import Ranks


class Batches:
    """Random batches of a data set, with replacement.

    Columns that fit stay on the device, where a batch draws its rows from `rng`. Of all others,
    processes read raw batches ahead of time.

    Args:
        data: the columns.
        config: the batch size, the seed and the number of processes that read.
        ranks: the processes that share every batch.
        rng: a generator on the device, which also is where batches are made.
        layout: the memory format of columns with four dimensions.

    Attributes:
        resident: whether the columns are on the device.
        drawn: the number of batches so far, by which a resumed run finds its place.
    """

    def __init__(
        self,
        data: Data,
        config: Config,
        ranks: Ranks,
        rng: torch.Generator,
        layout: torch.memory_format,
    ) -> None:
        self.data, self.config, self.ranks = data, config, ranks
        self.rng, self.layout = rng, layout
        self.device = rng.device
        self.share = ranks.share(config.batch_size)
        self.drawn = 0
        self._loader: BatchLoader | None = None
        self.place(_fits(data, self.device))

    def place(self, resident: bool) -> None:
        """Keep the columns on the device or not; batches are then drawn in another way."""
        self.resident = resident
        self.columns = [_on(self.device, table) for table in self.data.tables] if resident else []

    def fetch(self, count: int) -> list[Tensor]:
        """The raw columns of the next `count` batches for `take`; none where they are resident."""
        return [] if self.resident else [raw for _ in range(count) for raw in self._next()]

    def take(self, fetched: list[Tensor]) -> Batch:
        """The next batch: of those fetched, which leave the list, or of the columns here."""
        if self.resident:
            return self.draw()
        return self._batch({name: fetched.pop(0) for name in self.data.spec})

    def draw(self) -> Batch:
        """A batch of the resident columns."""
        raw: dict[str, Callable[[], Tensor]] = {}
        for columns in self.columns:
            length = len(next(iter(columns.values())))
            n = self.config.batch_size
            rows = torch.randint(length, (n,), generator=self.rng, device=self.device)
            rows = self.ranks.own(rows)
            raw |= {name: partial(column.index_select, 0, rows) for name, column in columns.items()}
        return self._batch(raw)

    def first(self, names: set[str], n: int) -> dict[str, Tensor]:
        """The first `n` rows of the named columns, decoded, again from the start where they end."""
        found: dict[str, Tensor] = {}
        for table in self.data.tables:
            if wanted := table.spec.keys() & names:
                raw = table.read(torch.arange(n) % len(table))
                found |= {name: self._decode(name, raw[name]) for name in wanted}
        return found

    def close(self) -> None:
        """End the processes that read; the next batch starts new ones."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _batch(self, raw: Mapping[str, Tensor | Callable[[], Tensor]]) -> Batch:
        return Batch({name: partial(self._decode, name, raw[name]) for name in raw}, self.share)

    def _decode(self, name: str, raw: Tensor | Callable[[], Tensor]) -> Tensor:
        values = self.data.spec[name].decode(raw if isinstance(raw, Tensor) else raw())
        return values.contiguous(memory_format=self.layout) if values.dim() == 4 else values

    def _next(self) -> Sequence[Tensor]:
        if self._loader is None:
            self._loader = BatchLoader(
                self.data,
                self.config.batch_size,
                seed=self.config.seed,
                first=self.drawn,
                part=(self.ranks.rank, self.ranks.size),
                workers=self.config.workers,
                device=self.device,
            )
        columns = next(self._loader)
        return [columns[name] for name in self.data.spec]


def _fits(data: Data, device: torch.device) -> bool:
    """Whether the columns can stay on the device and leave half of its free memory to training."""
    columns = [table.columns for table in data.tables]
    if None in columns:
        return False
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.nbytes for part in columns if part for t in part.values()) <= free // 2


def _on(device: torch.device, table: Table) -> dict[str, Tensor]:
    return {name: column.to(device) for name, column in (table.columns or {}).items()}
