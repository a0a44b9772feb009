"""What is told while a trainer trains: to a terminal, to files, to code of one's own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gankernels.train import checkpoint, report
from gankernels.train.files import write_atomically
from gankernels.train.losses import GRADIENT_NORM
from gankernels.train.tensorboard import TensorBoard

if TYPE_CHECKING:
    from gankernels.train.trainer import Trainer


class Callback:
    """Something that `Trainer.fit` tells what it does; a subclass overrides what it wants.

    All methods are called between two iterations, in the order in which the callbacks were given,
    on the process that writes the run folder only. `trainer.stop()` ends the run early, saved as
    always. What a method raises ends the run.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first iteration; a resumed run starts at `trainer.step`."""

    def on_step(self, trainer: Trainer) -> None:
        """After every iteration. Losses are on the device still: reading them here costs time."""

    def on_report(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Every `log_every` iterations, and at the end: mean losses, `it_per_s` and what not."""

    def on_samples(self, trainer: Trainer, path: Path) -> None:
        """After a grid of samples was written to `path`."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written to `path`."""

    def on_end(self, trainer: Trainer) -> None:
        """At the end, also after an exception."""


class Progress(Callback):
    """Steps, losses and speed on stderr: a bar on a terminal, else a line per report."""

    def on_start(self, trainer: Trainer) -> None:
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("the bar needs tqdm: pip install gankernels[train]") from error
            self.bar = tqdm(
                total=trainer.config.steps, initial=trainer.step, unit="it", dynamic_ncols=True
            )

    def on_step(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_report(self, trainer: Trainer, values: dict[str, float]) -> None:
        told = {k: v for k, v in values.items() if not k.endswith((GRADIENT_NORM, "it_per_s"))}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in told.items())
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
            return
        step, steps = trainer.step, trainer.config.steps
        if "it_per_s" in values:
            speed = values["it_per_s"]
            left = time.strftime("%H:%M:%S", time.gmtime((steps - step) / max(speed, 1e-9)))
            shown += f"  {speed:.1f} it/s  {left} left"
        print(f"step {step}/{steps}  {shown}", file=sys.stderr, flush=True)

    def on_end(self, trainer: Trainer) -> None:
        if getattr(self, "bar", None) is not None:
            self.bar.close()


class Metrics(Callback):
    """metrics.jsonl: one JSON object per line, continued where a resumed run stopped."""

    def on_start(self, trainer: Trainer) -> None:
        path = trainer.run / "metrics.jsonl"
        # A killed run may have logged beyond its last checkpoint, and half a line.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= trainer.step]
        if kept != lines:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))
        self.file = path.open("a")

    def on_report(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": trainer.step, **values}) + "\n")
        self.file.flush()

    def on_end(self, trainer: Trainer) -> None:
        if hasattr(self, "file"):
            self.file.close()


class Boards(Callback):
    """TensorBoard's event files and report.html, where the libraries they need are installed."""

    def on_start(self, trainer: Trainer) -> None:
        self.board = None
        if TensorBoard.available():
            self.board = TensorBoard(trainer.run / "tensorboard", trainer.step)

    def on_report(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self.board is not None:
            self.board.write(trainer.step, values)

    def on_samples(self, trainer: Trainer, path: Path) -> None:
        if self.board is not None:
            self.board.image(trainer.step, path)
        if report.available():
            report.write_report(trainer.run)

    def on_end(self, trainer: Trainer) -> None:
        if getattr(self, "board", None) is not None:
            self.board.close()


class Score(Callback):
    """Scores samples at every checkpoint, and keeps that of the least Fréchet distance as best.pt.

    Reported are score/frechet and, of a conditional game, score/accuracy. The classifier in whose
    features images are compared is trained at the first score, unless the run folder has it.
    """

    #: Samples per score: enough to tell generators apart, few enough not to hold up a run.
    COUNT = 2000

    def on_start(self, trainer: Trainer) -> None:
        self.classifier = None
        self.best = checkpoint.best_score(trainer.run)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        from gankernels import metrics

        if self.classifier is None:
            self.classifier, _ = metrics.load_or_train_classifier(
                trainer.data, trainer.run, device=trainer.device
            )
            self.features = metrics.features(self.classifier, trainer.data.images)
        with trainer.sampling() as game:
            scores = metrics.evaluate(
                lambda labels, n, rng: game.sample(n, rng=rng, labels=labels),
                trainer.data,
                self.classifier,
                n=min(self.COUNT, len(trainer.data)),
                conditional=game.conditional,
                seed=trainer.config.seed,
                real_features=self.features,
            )
        values = {"score/frechet": scores.frechet}
        if scores.accuracy is not None:
            values["score/accuracy"] = scores.accuracy
        trainer.tell("on_report", values)
        if self.best is None or scores.frechet < self.best:
            self.best = scores.frechet
            checkpoint.keep_best(trainer.run, path, self.best)
