"""Draws docs/speedup.png, the README's figure, from the results in results/.

``python benchmarks/figure.py`` measures nothing: it reads what the other scripts have saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OURS, COMPILED = "#0072b2", "#d0d4dc"


def rows_of(name: str, key: str) -> dict[str, dict]:
    """Returns the rows of results/<name>.json by the value that they have at `key`."""
    rows = json.loads((HERE / "results" / f"{name}.json").read_text())["rows"]
    return {str(row[key]): row for row in rows}


def bars() -> Iterator[tuple[str, float, float | None]]:
    """Yields a label, and how many times as fast as eager PyTorch we and torch.compile are."""
    norm = rows_of("batch_norm_leaky_relu", "case")
    for label, case in {
        "BatchNorm + LeakyReLU, forward": "float32 contiguous forward",
        "BatchNorm + LeakyReLU, forward + backward": "float32 contiguous backward",
        "BatchNorm + LeakyReLU, penalty step": "float32 contiguous penalty",
        "the same, channels_last": "float32 channels_last penalty",
        "the same, bfloat16": "bfloat16 contiguous penalty",
        "the same, bfloat16 and channels_last": "bfloat16 channels_last penalty",
    }.items():
        row = norm[f"64x128x32x32 {case}"]
        seconds = row["seconds"]
        compiled = seconds["eager"] / seconds["compiled"] if "compiled" in seconds else None
        yield label, row["times_eager"], compiled
    seconds = rows_of("minibatch_discrimination", "case")["[128, 100, 5]"]["seconds"]
    yield "Minibatch discrimination", seconds["broadcasting"] / seconds["ours"], None
    stddev = rows_of("minibatch_stddev", "case")["64x256x16x16 float32 penalty step"]
    yield "Minibatch standard deviation, penalty step", stddev["times_eager"], None
    norms = rows_of("gradient_penalty", "case")["reduction 64x3x64x64"]
    yield "Gradient norm penalty", norms["times_eager"], None
    resnet = rows_of("fuse", "network")["ResNet"]
    yield "Whole ResNet critic, penalty step", resnet["times_faster"]["penalty step"], None


def main() -> None:
    labels, ours, compiled = zip(*bars(), strict=True)
    places = range(len(labels))
    figure, axes = plt.subplots(figsize=(8, 3.9), dpi=110)
    axes.barh(places, ours, 0.72, color=OURS, label="gankernels")
    axes.barh(
        places,
        [value or 0 for value in compiled],
        0.3,
        color=COMPILED,
        label="torch.compile of the whole step",
    )
    for place, value in enumerate(ours):
        digits = 0 if value >= 10 else 1 if value >= 2 else 2
        axes.text(value * 1.05, place, f"{value:.{digits}f}x", va="center", fontsize=9)
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 70)
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"], fontsize=9)
    axes.minorticks_off()
    axes.set_xlabel("times as fast as eager PyTorch, on 2 CPU threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "speedup.png")


if __name__ == "__main__":
    main()
