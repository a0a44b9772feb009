"""What a run tells: a progress bar, or lines where there is no terminal, and metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Progress:
    """Shows steps, losses and speed on stderr: a bar on a terminal, else a line per report."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps = steps
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("the bar needs tqdm: pip install gankernels[train]") from error
            self.bar = tqdm(total=steps, initial=step, unit="it", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar:
            self.bar.update()

    def report(self, step: int, losses: dict[str, float], speed: float) -> None:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if self.bar:
            self.bar.set_postfix_str(shown)
        else:
            left = time.strftime("%H:%M:%S", time.gmtime((self.steps - step) / speed))
            print(
                f"step {step}/{self.steps}  {shown}  {speed:.1f} it/s  {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar:
            self.bar.close()


class Metrics:
    """metrics.jsonl: one JSON object per line, continued where a resumed run stopped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed run may have logged beyond its last checkpoint, and half a line.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            path.write_text("".join(kept))
        self.file = path.open("a")

    def write(self, **row: Any) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
