"""The callbacks of every run: progress bar, metrics file, TensorBoard, report and scores."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gankernels import _console as console
from gankernels import metrics
from gankernels._files import append, make_way, set_aside, write_atomically
from gankernels.train import checkpoint, report
from gankernels.train.callback import Callback, Run
from gankernels.train.losses import GRADIENT_NORM
from gankernels.train.tensorboard import TensorBoard


class Progress(Callback):
    """Steps, losses and speed on stderr: a bar on a terminal, else a line per report."""

    shows = "progress on stderr"

    def on_start(self, trainer: Run) -> None:
        self.bar = console.bar(total=trainer.config.steps, initial=trainer.step, unit="it")

    def on_step(self, trainer: Run) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_report(self, trainer: Run, values: dict[str, float]) -> None:
        losses = {k: v for k, v in values.items() if not k.endswith((GRADIENT_NORM, "it_per_s"))}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
            return
        step, steps = trainer.step, trainer.config.steps
        if "it_per_s" in values:
            speed = values["it_per_s"]
            rate = f"{speed:.1f}" if speed >= 1 else f"{speed:.2g}"
            shown += f"  {rate} it/s  {time_left(steps - step, speed)} left"
        console.say(f"step {step}/{steps}  {shown}")

    def on_end(self, trainer: Run) -> None:
        if getattr(self, "bar", None) is not None:
            self.bar.close()


def time_left(steps: int, speed: float) -> str:
    """The remaining time as hours:minutes:seconds, after days if there are any; "?" if unknown."""
    if not 0 < speed < math.inf:
        return "?"
    minutes, seconds = divmod(round(steps / speed), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days:,} d " if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"


class Metrics(Callback):
    """metrics.jsonl: one JSON object per line, continued where a resumed run stopped."""

    shows = "metrics.jsonl"

    def on_start(self, trainer: Run) -> None:
        self.path = path = trainer.run / "metrics.jsonl"
        make_way(path)
        if not path.exists():
            return
        content = path.read_bytes()
        # A killed run may have logged beyond its last checkpoint, and half a line.
        lines = content.splitlines(keepends=True)
        torn = bool(lines) and not lines[-1].endswith(b"\n")
        rows = [report.read_row(line) for line in lines[: len(lines) - torn]]
        kept = [
            line
            for line, row in zip(lines, rows, strict=False)
            if row is not None and row["step"] <= trainer.step
        ]
        if None in rows:
            place = rows.index(None) + 1
            set_aside(path, f"has invalid lines, the first of them line {place}")
        if len(kept) < len(lines):
            write_atomically(path, lambda file: file.writelines(kept))

    def on_report(self, trainer: Run, values: dict[str, Any]) -> None:
        append(self.path, json.dumps({"step": trainer.step, **values}).encode() + b"\n")


class Board(Callback):
    """TensorBoard's event files, where it is installed."""

    shows = "TensorBoard's log"

    def on_start(self, trainer: Run) -> None:
        self.board: TensorBoard | None = None
        if TensorBoard.available():
            self._open(trainer)

    def on_report(self, trainer: Run, values: dict[str, float]) -> None:
        if (board := self._ready(trainer)) is not None:
            board.write(trainer.step, values)

    def on_samples(self, trainer: Run, path: Path) -> None:
        if (board := self._ready(trainer)) is None:
            return
        if path.suffix == ".png":
            board.image(trainer.step, path)
        elif path.suffix == ".txt":
            board.text(trainer.step, path.read_text())

    def on_end(self, trainer: Run) -> None:
        if (board := getattr(self, "board", None)) is not None:
            board.close()

    def _open(self, trainer: Run) -> None:
        self.folder = trainer.run / "tensorboard"
        make_way(self.folder / "events")
        self.board = TensorBoard(self.folder, trainer.step)

    def _ready(self, trainer: Run) -> TensorBoard | None:
        """The log, reopened if its folder was deleted during training."""
        if self.board is not None and not self.folder.is_dir():
            with contextlib.suppress(Exception):
                self.board.close()
            self._open(trainer)
        return self.board


class Report(Callback):
    """report.html, where matplotlib is installed."""

    shows = report.FILE

    def on_samples(self, trainer: Run, path: Path) -> None:
        if report.available():
            make_way(trainer.run / report.FILE)
            report.write_report(trainer.run, damaged=set_aside)


class Score(Callback):
    """Scores samples at every checkpoint, and keeps the best one as best.pt.

    Args:
        names: the metrics, reported as score/<name>; the first one decides which is best.
    """

    shows = "score"

    #: Samples per score: enough to distinguish generators, few enough not to slow down a run.
    COUNT = 2000

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def on_start(self, trainer: Run) -> None:
        self.evaluation: metrics.Evaluation | None = None
        self.best: float | None = None
        best = trainer.run / checkpoint.FOLDER / "best.pt"
        try:
            if best.is_file() and (kept := checkpoint.best_score(trainer.run)):
                metric, score = kept
                if metric == self.names[0]:
                    self.best = score
                else:
                    console.warn(
                        f"{best} is the best by {metric}: the best by {self.names[0]} replaces it"
                    )
        except (ValueError, KeyError, TypeError, OSError) as error:
            for path in (best.with_suffix(".json"), best):
                set_aside(path, f"has no score that can be read ({console.describe(error)})")
        for path in (best.with_suffix(".json"), best):
            make_way(path)

    def on_checkpoint(self, trainer: Run, path: Path) -> None:
        game = trainer.game
        if self.evaluation is None:
            cache = metrics.Cache(trainer.run, trainer.device)
            self.evaluation = metrics.Evaluation(
                self.names, trainer.data, cache, game.makes, game.given
            )
        with trainer.sampling() as game:
            scores = self.evaluation.score(
                game.sample,
                n=min(self.COUNT, self.evaluation.count(None)),
                seed=trainer.config.seed,
            )
        values = {f"score/{k}": v for found in scores.values() for k, v in found.items()}
        trainer.notify("on_report", values)
        decisive = next(iter(scores[self.names[0]].values()), None)
        if decisive is not None and self._is_best(decisive):
            self.best = decisive
            checkpoint.keep_best(trainer.run, path, self.names[0], decisive)

    def _is_best(self, score: float) -> bool:
        if self.best is None:
            return True
        lower = metrics.get(self.names[0]).lower_is_better
        return score < self.best if lower else score > self.best
