"""Scores samples by several metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gankernels._memory import require
from gankernels.data import Data, Table
from gankernels.metrics._metric import Cache, Metric, get, names

MAX_SAMPLES = 10_000
_BATCH_SIZE = 256


#: `sample(n, rng=rng, **given)` returns `n` samples as networks make them, such as `Game.sample`.
#: All randomness is drawn from `rng`, which is on the CPU; `given` are columns of `n` values.
Sampler = Callable[..., Tensor]


def parse(text: str) -> list[str]:
    """The names of metrics in a text such as `"frechet,accuracy"`. Raises ValueError for others."""
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        get(name)
    return list(dict.fromkeys(chosen))


def suitable(data: Data, column: str, given: Sequence[str]) -> list[str]:
    """The names of all metrics that can judge samples of a column."""
    found = []
    for name in names():
        try:
            get(name).check(data, column, given)
        except ValueError:
            continue
        found.append(name)
    return found


class Evaluation:
    """Metrics that are prepared for the samples of a data set.

    Args:
        chosen: the names of the metrics.
        data: the real data.
        cache: see `Cache`.
        column: the column that samples are of.
        given: the columns that samples are made from.

    Raises:
        ValueError: a metric that does not exist, or cannot judge such samples.
    """

    def __init__(
        self,
        chosen: Sequence[str],
        data: Data,
        cache: Cache,
        column: str = "images",
        given: Sequence[str] = (),
    ) -> None:
        check(chosen, data, column, given)
        self.data, self.column, self.given = data, column, given
        self.metrics: dict[str, Metric] = {name: get(name)(column) for name in chosen}
        for metric in self.metrics.values():
            metric.prepare(data, cache)

    @property
    def facts(self) -> dict[str, float]:
        """The facts of all metrics about the real data."""
        return {key: value for m in self.metrics.values() for key, value in m.facts.items()}

    def score(
        self, sample: Sampler, *, n: int | None = None, seed: int = 0
    ) -> dict[str, dict[str, float]]:
        """The scores of samples by every metric, by their names.

        Samples are rounded as if saved. They are made from rows of the data, so that classes come
        in the data's proportions.

        Args:
            sample: makes up to 256 samples at a time.
            n: the number of samples, at least 2; by default as many as there are rows, at most
                10,000.
            seed: the random seed of the samples.

        Raises:
            ValueError: `n` is too small, or samples have another shape or are not finite.
        """
        samples = self.draw(sample, self.count(n), seed)
        return {name: metric.score(samples) for name, metric in self.metrics.items()}

    def count(self, n: int | None) -> int:
        """The number of samples that `score` draws for the argument `n`."""
        n = min(len(self._table(self.column)), MAX_SAMPLES) if n is None else n
        if n < 2:
            raise ValueError(f"n must be at least 2, got {n}")
        return n

    def draw(self, sample: Sampler, n: int, seed: int) -> dict[str, Tensor]:
        """Raw columns of `n` samples and of the conditions that they are made from."""
        field = self.data.spec[self.column]
        require(n * max(field.nbytes, 256), f"n={n}")
        rng = torch.Generator().manual_seed(seed)
        raw = self._conditions(n, rng)
        parts = []
        for start in range(0, n, _BATCH_SIZE):
            count = min(_BATCH_SIZE, n - start)
            given = {
                name: self.data.spec[name].decode(column[start : start + count])
                for name, column in raw.items()
            }
            made = sample(count, rng=rng, **given)
            if len(made) != count:
                raise ValueError(f"sample must return {count} samples, got {len(made)}")
            if made.is_floating_point() and not made.isfinite().all():
                raise ValueError("samples must be finite, the generator has diverged")
            parts.append(field.encode(made).cpu())
        samples = torch.cat(parts)
        field.check("samples", samples)
        return {**raw, self.column: samples}

    def _conditions(self, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Raw columns `given`: evenly spaced rows of the data, sorted by class, in random order."""
        raw: dict[str, Tensor] = {}
        for name in self.given:
            if name in raw:
                continue
            table = self._table(name)
            rows = torch.arange(n) * len(table) // n
            columns = table.columns
            if columns is not None and "labels" in columns:
                rows = columns["labels"].cpu().argsort(stable=True)[rows]
            rows = rows[torch.randperm(n, generator=rng)]
            found = table.read(rows) if columns is None else columns
            for column in table.spec.keys() & set(self.given):
                raw[column] = found[column] if columns is None else found[column].cpu()[rows]
        return raw

    def _table(self, column: str) -> Table:
        return next(table for table in self.data.tables if column in table.spec)


def check(chosen: Sequence[str], data: Data, column: str, given: Sequence[str]) -> None:
    """Raises ValueError if a metric does not exist, or cannot judge samples of a column."""
    for name in chosen:
        get(name).check(data, column, given)
