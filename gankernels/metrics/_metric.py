"""The base class of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gankernels._registry import Registry
from gankernels.data import Data, Field

#: Raw columns `(n, ...)` by name: the samples, and the columns that they were made from.
Samples = Mapping[str, Tensor]


class Cache:
    """Storage that metrics share while they judge samples of one data set.

    Args:
        folder: for files that later runs read.
        device: where metrics compute.
        progress: whether to show a progress bar for long computations.
    """

    def __init__(
        self, folder: Path, device: str | torch.device = "cpu", progress: bool = False
    ) -> None:
        self.folder, self.device, self.progress = folder, device, progress
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make()`, which is called for the first of equal keys only."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Metric(ABC):
    """A judgment of samples against real data.

    A new metric is a new file in this folder that defines a subclass.

    Args:
        column: the name of the column that samples are of.
    """

    #: The types of the fields that the metric uses: the type of the samples, then the types of the
    #: columns that they must be made from.
    needs: ClassVar[tuple[type[Field], ...]]
    #: Whether the least score is the best.
    lower_is_better: ClassVar[bool] = True
    #: Whether `gankernels evaluate` also shows the score of an untrained game, to compare with.
    relative: ClassVar[bool] = False
    #: The label and the format of a line for every score and fact, in the order of the lines.
    labels: ClassVar[dict[str, tuple[str, str]]] = {}

    def __init__(self, column: str) -> None:
        self.column = column

    @property
    def facts(self) -> dict[str, float]:
        """Facts that `prepare` computed and that help to interpret the scores."""
        return {}

    @classmethod
    def check(cls, data: Data, column: str, given: Sequence[str]) -> None:
        """Raises ValueError if the metric cannot judge samples of a column of these data.

        Args:
            given: the columns that samples are made from.
        """
        sampled, others = type(data.spec[column]), [type(data.spec[name]) for name in given]
        first, *more = cls.needs
        if issubclass(sampled, first) and all(
            any(issubclass(other, need) for other in others) for need in more
        ):
            return
        raise ValueError(
            f"samples for the metric {name_of(cls)!r} must be {_made_from(first, more)}, "
            f"got {_made_from(sampled, others)}"
        )

    @abstractmethod
    def prepare(self, data: Data, cache: Cache) -> None:
        """Compute the statistics of the real data, once."""

    @abstractmethod
    def score(self, samples: Samples) -> dict[str, float]:
        """The scores of samples, by name; checkpoints are compared by the first."""


def _made_from(sampled: type[Field], given: Sequence[type[Field]]) -> str:
    source = f" made from {', '.join(field.__name__ for field in given)}" if given else ""
    return f"of type {sampled.__name__}{source}"


_registry: Registry[Metric] = Registry("gankernels.metrics", "metric", Metric)  # type: ignore[type-abstract]
names = _registry.names
"""The names of all metrics, sorted."""
get = _registry.get
"""The metric class of a name. Raises ValueError for an unknown one, with the names that exist."""
register = _registry.register
"""Add a metric class under a name, for this process."""
name_of = _registry.name_of
"""The name of a metric."""
