"""The HTML report of a run: state, samples, curves, settings."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gankernels._console import describe, warn
from gankernels._files import read_json
from gankernels._html import WIDTH, Page, png_size, style
from gankernels._paths import expand
from gankernels._version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "report.html"

#: Groups of metrics.jsonl (the part of a name before a "/"), and what they measure. Any other group
#: is a player, and its members are the terms of its loss, except for names in this table:
#: "critic/gradient_norm" is grouped with the other norms. A name without "/" is its own group.
MEASURES = {"score": "score", "gradient_norm": "gradient norm", "weight_norm": "weight norm"}

#: Points from which on a curve is smoothed, and the number of points then drawn.
MANY = 200
DRAWN = 400

#: The most sample grids shown, and the most pixels for the width of one.
GRIDS = 12
GRID_PIXELS = 480


def available() -> bool:
    """Whether matplotlib is installed, which the report needs."""
    return importlib.util.find_spec("matplotlib") is not None


def write_report(
    run: str | Path, damaged: Callable[[Path, str], Any] = lambda path, why: warn(f"{path} {why}")
) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    It is one self-contained file, made from config.json and from whichever of these exist:
    metrics.jsonl (invalid lines are skipped), samples.png, samples/step_*.png, and scores.json,
    which `evaluate --json` writes.

    Args:
        damaged: called with a picture or scores that cannot be shown, and why; by default it warns.

    Raises:
        FileNotFoundError, ValueError: config.json is missing or not valid JSON.
        ImportError: matplotlib, or Pillow if grids are large, is missing.
    """
    run = expand(run)
    config = read_json(run / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{run / 'config.json'} holds no settings")
    rows = read_metrics(run / "metrics.jsonl")
    series = collect(rows)
    data = str(config.get("data", "unknown data"))
    title = f"{config.get('game', 'GAN')} on {Path(data).name or data}"

    page = Page(title)
    page.facts(dict(_state(config, rows)))
    _add_samples(page, run, damaged)
    if scores := _scores(run / "scores.json", damaged):
        page.section("Scores")
        page.facts({_words(name): value for name, value in scores.items()})
    speed = series.pop("it_per_s", None)
    if series:
        page.section("Metrics")
        for group, members in _groups(series).items():
            loss = f"{_words(group)} loss" if group not in series else _words(group)
            quantity = MEASURES.get(group, loss)
            page.figure(
                plot(members, quantity, apart=group == "score"),
                alt=f"{quantity} over steps: {', '.join(members)}",
                caption=_note(members),
            )
        page.table(["metric", "first", "last", "lowest", "highest"], list(_ranges(series)))
    if speed:
        page.section("Speed")
        page.figure(
            plot({"it/s": speed}, "iterations per second", from_zero=True),
            alt="Iterations per second over steps",
            caption=_note({"it/s": speed}),
        )
    page.section("Configuration")
    settings = [(name, _setting(value)) for name, value in config.items() if name != "format"]
    page.table(["setting", "value"], settings)
    page.footer(
        f"{run.resolve().name}, {time.strftime('%Y-%m-%d %H:%M')}, gankernels {__version__}"
    )
    page.write(run / FILE)
    return run / FILE


class Series(NamedTuple):
    """A metric: its steps and its values, float64 arrays of the same length, all finite."""

    steps: np.ndarray
    values: np.ndarray


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step; lines that are torn or lack a step are left out."""
    if not path.is_file():
        return []
    rows = map(read_row, path.read_bytes().splitlines())
    return sorted((row for row in rows if row is not None), key=lambda row: row["step"])


def read_row(line: bytes) -> dict[str, Any] | None:
    """The metrics in a line of metrics.jsonl; None if it is invalid, such as a torn line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_number(row.get("step")) else None


def collect(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """The finite values of each name but `step`."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _is_number(value):
                points.setdefault(name, []).append((row["step"], value))
    return {name: Series(*np.array(pairs, float).T) for name, pairs in points.items()}


def smooth(series: Series) -> Series:
    """The running mean over a fiftieth of a series, at up to DRAWN points of it."""
    n = len(series.values)
    chosen = np.unique(np.linspace(0, n - 1, DRAWN).astype(int))
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    reach = max(1, n // 100)
    low, high = np.maximum(chosen - reach, 0), np.minimum(chosen + reach + 1, n)
    return Series(series.steps[chosen], (sums[high] - sums[low]) / (high - low))


def thin(series: Series) -> Series:
    """The least and the greatest value of each of DRAWN parts: the plot looks the same."""
    if len(series.values) <= 2 * DRAWN:
        return series
    starts = np.linspace(0, len(series.values), DRAWN, endpoint=False).astype(int)
    extremes = [extreme.reduceat(series.values, starts) for extreme in (np.minimum, np.maximum)]
    return Series(np.repeat(series.steps[starts], 2), np.stack(extremes, axis=1).ravel())


def plot(
    members: dict[str, Series], quantity: str, from_zero: bool = False, apart: bool = False
) -> Figure:
    """Plot curves over steps in one panel, or in one panel each if one would flatten another.

    Args:
        members: the curves by their names in the legend.
        quantity: the label of the vertical axis.
        from_zero: whether that axis begins at zero.
        apart: use one panel per curve in any case.
    """
    with style():
        from matplotlib.figure import Figure

        apart = apart or _differ(members)
        panels = [[name] for name in members] if apart else [list(members)]
        figure = Figure(figsize=(WIDTH, 0.7 + 2.2 * len(panels)))
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, names in zip(axes, panels, strict=True):
            for name in names:
                _draw(ax, name, members[name])
            _scale(ax, [members[name] for name in names], from_zero)
            ax.set_ylabel(quantity)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6)
        axes[-1].set_xlabel("step")
    return figure


def _draw(ax: Axes, name: str, series: Series) -> None:
    if len(series.values) < MANY:
        marker = "o" if len(series.values) == 1 else None
        ax.plot(*series, label=name, marker=marker, markersize=4)
        return
    (line,) = ax.plot(*smooth(series), label=name, zorder=3)
    ax.plot(*thin(series), color=line.get_color(), linestyle="-", linewidth=0.7, alpha=0.25)


def _scale(ax: Axes, shown: list[Series], from_zero: bool) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.margins(x=0.01)
    many = [series for series in shown if len(series.values) >= MANY]
    if many:  # a few extreme values must not decide the scale
        parts = [np.quantile(series.values, [0.005, 0.995]) for series in many]
        parts += [smooth(series).values for series in many]
        parts += [series.values for series in shown if len(series.values) < MANY]
        values = np.concatenate(parts)
        margin = 0.05 * np.ptp(values) or 0.5
        ax.set_ylim(values.min() - margin, values.max() + margin)
    if from_zero:
        ax.set_ylim(bottom=0)


def _differ(members: dict[str, Series]) -> bool:
    """Whether the largest curve is far above the smallest."""
    reach = [np.quantile(np.abs(series.values), 0.95) for series in members.values()]
    return max(reach) > 20 * min(reach)


def _note(members: dict[str, Series]) -> str:
    if all(len(series.values) < MANY for series in members.values()):
        return ""
    return "Running mean over a fiftieth of the run; faint behind it, what was logged."


def _groups(series: dict[str, Series]) -> dict[str, dict[str, Series]]:
    """The series grouped by the part of their names before "/", each under the part after it.

    If the latter part is in MEASURES, the two parts are exchanged.
    """
    groups: dict[str, dict[str, Series]] = {}
    for name, values in series.items():
        group, _, member = name.partition("/")
        if member in MEASURES:
            group, member = member, group
        groups.setdefault(group, {})[member or group] = values
    return groups


def _ranges(series: dict[str, Series]) -> Iterator[tuple[str, float, float, float, float]]:
    for name, (_, values) in series.items():
        first, last = float(values[0]), float(values[-1])
        yield name, first, last, float(values.min()), float(values.max())


def _state(config: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The facts at the top of the page."""
    step, steps = (rows[-1]["step"] if rows else 0), config.get("steps")
    yield "step", f"{step:,} of {steps:,}" if isinstance(steps, int) else f"{step:,}"
    if isinstance(steps, int):
        yield "state", "finished" if step >= steps else "not finished"
    speeds = [(row["step"], row["it_per_s"]) for row in rows if _is_number(row.get("it_per_s"))]
    speeds = [(step, speed) for step, speed in speeds if speed > 0]
    if speeds:
        yield "iterations per second", f"{speeds[-1][1]:.1f}"
        before = [0, *(step for step, _ in speeds)]
        seconds = sum((step - last) / v for (step, v), last in zip(speeds, before, strict=False))
        yield "time of the steps", _duration(seconds)
    for name in ("batch_size", "precision"):
        if name in config:
            yield _words(name), config[name]


def _add_samples(page: Page, run: Path, damaged: Callable[[Path, str], Any]) -> None:
    grids = {}
    folder = run / "samples"
    for path in folder.glob("step_*.png") if folder.is_dir() else ():
        if found := re.fullmatch(r"step_(\d+)\.png", path.name):
            grids[int(found[1])] = path
    final = _picture(run / "samples.png", damaged)
    read = {step: _picture(grids[step], damaged) for step in _spread(sorted(grids))}
    pictures = {step: pair for step, pair in read.items() if pair is not None}
    steps = list(pictures)
    if final is not None or steps:
        page.section("Samples")
        # A resumed run has newer grids than samples.png, which the end of the former run wrote.
        if final and not (steps and _age(grids[steps[-1]]) > _age(run / "samples.png")):
            png, shown = final[0], "samples of the trained generator"
        else:
            png, shown = pictures[steps[-1]][0], f"samples at step {steps[-1]:,}"
        own = png_size(png)[0]
        enlarged = own * max(1, int(900 // own))  # whole pixels stay sharp
        page.figure(png, alt=f"A grid of {shown}", caption=shown.capitalize(), width=enlarged)
    lines = run / "samples.txt"
    if lines.is_file():
        page.section("Samples")
        page.preformatted(_first_lines(lines))
    if len(steps) > 1:
        page.section("Samples over time")
        page.gallery(
            (pictures[step][1], f"A grid of samples at step {step:,}", f"step {step:,}")
            for step in steps
        )


def _first_lines(path: Path, count: int = 40) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(itertools.islice(file, count))


def _spread(steps: list[int]) -> list[int]:
    """Up to GRIDS of the steps, the first and the last among them."""
    return sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, GRIDS)} if steps else ())


def _picture(path: Path, damaged: Callable[[Path, str], Any]) -> tuple[bytes, bytes] | None:
    """A PNG file, and the same scaled down for the page; None if it is not a valid PNG."""
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        png = path.read_bytes()
        check_png(png)
        return png, _small(png)
    except ImportError:
        raise
    except Exception as error:  # a damaged picture can make Pillow raise anything
        damaged(path, f"is not a picture that can be shown ({describe(error)})")
        return None


def check_png(png: bytes) -> None:
    """Raises ValueError if a PNG file is torn, or one of its checksums is wrong."""
    if not all(png_size(png)):
        raise ValueError("image must have pixels")
    place, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", png[place : place + 8].ljust(8, b"\0"))
        end = place + 8 + length
        checksum = png[end : end + 4]
        if len(checksum) < 4 or zlib.crc32(png[place + 4 : end]) != int.from_bytes(checksum, "big"):
            raise ValueError(f"image is damaged beyond byte {place}")
        place = end + 4


def _small(png: bytes) -> bytes:
    """A picture, scaled down if it is larger than the page shows it."""
    width, height = png_size(png)
    if width <= GRID_PIXELS:
        return png
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install gankernels[train]") from error
    picture = Image.open(io.BytesIO(png), formats=["PNG"])
    file = io.BytesIO()
    picture.resize((GRID_PIXELS, max(1, round(height * GRID_PIXELS / width)))).save(file, "PNG")
    return file.getvalue()


def _scores(path: Path, damaged: Callable[[Path, str], Any]) -> dict[str, Any]:
    """The content of scores.json."""
    if not path.exists():
        return {}
    try:
        scores = read_json(path) if path.is_file() else None
        if not isinstance(scores, dict):
            raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        damaged(path, f"has no scores ({describe(error)})")
        return {}
    return scores


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _is_number(value: Any) -> bool:
    try:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    except OverflowError:  # a whole number beyond floating point
        return False


def _words(name: str) -> str:
    return name.replace("_", " ")


def _setting(value: Any) -> str:
    """A value as in config.json and `--set`, so that it can be copied."""
    return value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
