"""Benchmark results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gankernels.bench.ops import OPS, Case
from gankernels.bench.timing import Timing
from gankernels.bench.training import Training

FORMAT = 1
#: Rows with a larger spread are noisy.
NOISY = 0.3


@dataclass
class Row:
    """The results of one case: a Timing for each contender, or the error that it raised."""

    case: Case | Training
    timings: dict[str, Timing]
    errors: dict[str, str]

    def ratio(self, name: str) -> float | None:
        """Another contender's time divided by ours; None if one of them is missing."""
        if name not in self.timings or "ours" not in self.timings:
            return None
        return self.timings[name].median / self.timings["ours"].median

    @property
    def baselines(self) -> list[str]:
        return [name for name in (*self.timings, *self.errors) if name not in ("clone", "ours")]

    @property
    def spread(self) -> float | None:
        """The largest interquartile range of a ratio's two sides, as a share of the median."""
        sides = [t.spread for name, t in self.timings.items() if name != "clone"]
        return max(sides, default=None)

    @property
    def label(self) -> str:
        """The row's name within its table."""
        return str(self.case)

    @property
    def group(self) -> str:
        """What a plot groups the rows of a table by."""
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": {name: t._asdict() for name, t in self.timings.items()},
            "ratios": {f"times_{name}": self.ratio(name) for name in self.baselines},
            "errors": self.errors,
        }


@dataclass
class OpRow(Row):
    """The results of a case of an op."""

    case: Case

    @property
    def clones(self) -> float | None:
        """Our time divided by that of a clone of the input, for ops bound by memory."""
        ratio = self.ratio("clone")
        return None if ratio is None or self.case.fewest_clones is None else 1 / ratio

    @property
    def label(self) -> str:
        return f"{self.case.input}, {self.case.what}"

    @property
    def group(self) -> str:
        return self.case.input

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.case.op,
            "what": self.case.what,
            "shape": list(self.case.shape),
            "dtype": str(self.case.dtype)[6:],
            "layout": self.case.layout,
            "fewest_clones": self.case.fewest_clones,
            "clones": self.clones,
        } | super().to_json()


@dataclass
class TrainingRow(Row):
    """The results of a game."""

    case: Training

    def to_json(self) -> dict[str, Any]:
        head = {"game": self.case.game, "settings": dict(self.case.settings)}
        return head | super().to_json()


@dataclass
class Results:
    """The rows measured so far, and the machine they were measured on."""

    environment: dict[str, Any]
    planned: int
    quick: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    took: float = 0.0

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.planned

    @property
    def failed(self) -> list[Row]:
        """The rows in which ours failed."""
        return [row for row in self.rows if "ours" in row.errors]

    def of(self, op: str) -> list[OpRow]:
        """The rows of an op."""
        return [row for row in self.rows if isinstance(row, OpRow) and row.case.op == op]

    @property
    def training(self) -> list[TrainingRow]:
        """The rows of games."""
        return [row for row in self.rows if isinstance(row, TrainingRow)]

    @property
    def noisy(self) -> str | None:
        """A warning if the machine was too busy for reliable figures."""
        env = self.environment
        count = sum((row.spread or 0) > NOISY for row in self.rows)
        if env["load"] <= env["processors"] and 2 * count <= len(self.rows):
            return None
        return (
            f"The machine was busy: a load of {env['load']:.1f} on {env['processors']} processors "
            f"at the start, and noise above {NOISY:.0%} in {count} of {len(self.rows)} rows. "
            "Use fewer threads (OMP_NUM_THREADS) or an idle machine for better figures."
        )

    @property
    def ops(self) -> list[str]:
        """The ops that have rows."""
        return [op for op in OPS if self.of(op)]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "environment": self.environment,
            "quick": self.quick,
            "complete": self.complete,
            "took_seconds": self.took,
            "ceilings": self.ceilings,
            "ops": [row.to_json() for op in self.ops for row in self.of(op)],
            "training": [row.to_json() for row in self.training],
        }
