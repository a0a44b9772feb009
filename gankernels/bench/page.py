"""Writes the results as a page with plots."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gankernels._console import describe, warn
from gankernels._files import write_atomically, write_json
from gankernels._html import SERIES, WIDTH, Page, style
from gankernels._paths import expand
from gankernels.bench.ops import OPS, PASSES
from gankernels.bench.results import OpRow, Results, Row
from gankernels.bench.table import TRAINING, baselines, tables

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FILE = "index.html"
PAPER, MUTED = "#ffffff", "#5a6373"  # of _html.py's light pages

METHOD = (
    "All contenders of a row ran in turn in one process, round after round, so that a slow moment "
    "of the machine affects all of them; the times are medians over the rounds. Noise is the "
    "largest interquartile range of the contenders, as a share of the median: ratios that differ "
    "by less are not significant. Calls shorter than a millisecond were repeated until one had "
    "passed. The allocator keeps large blocks (gankernels.tune_allocator) for all contenders. "
    "On a GPU the clock is read after synchronizing, so that times include launches by the host."
)
CLONES = (
    "Clones are our time divided by that of x.clone(), which reads and writes the input once. "
    "Fewest is the number of clones that move as many bytes as the pass must move if it accesses "
    "every tensor once. A clone of a small tensor stays in the caches, and every call has an "
    "overhead of some microseconds."
)
GAMES = (
    "The same trainer ran twice on the digits, with our kernels (ours) and with PyTorch's ops "
    'instead of them (eager, use_backend("reference")). The loop, the networks and the data are '
    "the same, so only the kernels make a difference."
)


def write(results: Results, folder: str | Path) -> Path | None:
    """Write results.json, index.html and the plots as PNG; return the page's path.

    If the plots cannot be drawn, there is a warning instead of a page.
    """
    folder = expand(folder)
    write_json(folder / "results.json", results.to_json())
    try:
        return write_page(results, folder)
    except OSError:
        raise
    except Exception as error:  # whatever a plotting library raises
        warn(f"{folder}: the plots could not be drawn: {describe(error)}")
        return None


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html, and its plots as PNG files to the same folder; return the page's path."""
    page = Page("gankernels bench")
    environment = {name.replace("_", " "): value for name, value in results.environment.items()}
    environment["instruction set"] = environment.pop("capability")
    page.facts(environment | {"cases": _count(results), "took": f"{results.took:.0f} s"})
    page.section("How it was measured")
    page.text(METHOD)
    if noisy := results.noisy:
        page.text(noisy)

    def show(figure: Figure, name: str, alt: str, caption: str = "") -> None:
        page.figure(figure, alt=alt, caption=caption)
        _save_png(figure, folder / f"{name}.png")

    for title, columns, body in tables(results):
        rows: Sequence[Row] = results.training if title == TRAINING else results.of(title)
        page.section(title)
        page.text(GAMES if title == TRAINING else OPS[title].baselines)
        page.table(columns, body, highlight="x eager" if "x eager" in columns else None)
        for row in rows:
            for name, why in row.errors.items():
                page.text(f"{row.case}: {name} failed: {why}")
        if "clones" in columns:
            page.text(CLONES)
        if series := sizes(results.of(title)):
            case = series[0].case
            show(
                plot_sizes(series),
                f"time_{title}",
                f"Time of {title} against the size of its input",
                f"{str(case.dtype)[6:]}, {case.layout}; the bands are the interquartile ranges.",
            )
        if any(row.ratio(name) for row in rows for name in row.baselines):
            show(plot_ratios(rows), f"speedup_{title}", f"Speed-up of {title}", "Times as fast.")
    if points := list(roofline(results)):
        page.section("Roofline")
        page.text(
            "The operations per second of the forward passes against their operations per byte, "
            "where operations and bytes are those that a pass cannot avoid. The roofs were "
            "measured on this machine: copies of a tensor larger than all caches and of one that "
            "fits in them, and the faster of a matrix product and a convolution in float32. A "
            "multiply-add counts as two operations, so additions alone, as in minibatch "
            "discrimination, can reach about half of that. Points above the slope of memory "
            "belong to inputs that stay in a cache."
        )
        show(
            plot_roofline(points, results.ceilings),
            "roofline",
            "Operations per second of the forward passes against operations per byte",
        )
    page.footer(f"gankernels {results.environment['gankernels']}, {results.environment['date']}")
    page.write(folder / FILE)
    return folder / FILE


def _count(results: Results) -> str:
    kind = ", quick" if results.quick else ""
    early = "" if results.complete else f" of {results.planned}, stopped early"
    return f"{len(results.rows)}{early}{kind}"


def _save_png(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png", dpi=150, facecolor=PAPER)
    write_atomically(path, lambda out: out.write(file.getvalue()))


# ---- time against size ---------------------------------------------------------------------------


def sizes(rows: list[OpRow]) -> list[OpRow]:
    """Returns the rows of the dtype and layout with the most shapes, if these are at least two."""
    groups: dict[tuple[torch.dtype, str], list[OpRow]] = {}
    for row in rows:
        groups.setdefault((row.case.dtype, row.case.layout), []).append(row)
    if not groups:
        return []
    largest = max(groups.values(), key=lambda group: len({row.case.shape for row in group}))
    return largest if len({row.case.shape for row in largest}) > 1 else []


def plot_sizes(rows: list[OpRow]) -> Figure:
    """Plots every contender's time over the number of elements, with a panel for each pass."""
    with style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

        passes = [what for what in PASSES if any(row.case.what == what for row in rows)]
        figure = Figure(figsize=(WIDTH, 3))
        panels = figure.subplots(1, len(passes), sharex=True, squeeze=False)[0]
        names = ["ours", *baselines(rows)]
        for ax, what in zip(panels, passes, strict=True):
            chosen = [row for row in rows if row.case.what == what]
            chosen.sort(key=lambda row: row.case.elements)
            for color, name in zip(SERIES, names, strict=False):
                _curve(ax, name, color, chosen)
            _limit(ax, chosen)
            ax.set(xscale="log", yscale="log", title=what, xlabel="elements of the input")
            plain_numbers(ax.yaxis)
            ax.xaxis.set_major_locator(FixedLocator(sorted({row.case.elements for row in rows})))
            ax.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
            ax.xaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel("ms")
        shown = {
            label: handle
            for ax in panels
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=6)
    return figure


def _curve(ax: Axes, name: str, color: str, rows: list[OpRow]) -> None:
    points = [(row.case.elements, row.timings[name]) for row in rows if name in row.timings]
    if not points:
        return
    x = [elements for elements, _ in points]
    y = [[getattr(t, part) * 1e3 for _, t in points] for part in ("median", "low", "high")]
    ax.plot(x, y[0], color=color, linestyle="-", marker="o", markersize=4, label=name)
    ax.fill_between(x, y[1], y[2], color=color, alpha=0.2, linewidth=0)


def _limit(ax: Axes, rows: list[OpRow]) -> None:
    points = [
        (row.case.elements, 1e3 * fewest * row.timings["clone"].median)
        for row in rows
        if (fewest := row.case.fewest_clones) is not None and "clone" in row.timings
    ]
    if points:
        label = "fewest bytes at a clone's speed"
        ax.plot(*zip(*points, strict=True), color=MUTED, linestyle=":", label=label)


def plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers (0.1), since `style` cannot typeset powers."""
    from matplotlib.ticker import FuncFormatter, StrMethodFormatter

    def between(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        return f"{value:g}" if high < 10 * low and f"{value:.0e}"[0] in "25" else ""

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(FuncFormatter(between))


# ---- speed-up ------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """How many times as fast as a baseline ours is."""

    row: Row
    baseline: str
    ratio: float


def plot_ratios(rows: Sequence[Row]) -> Figure:
    """Plots a bar for every case and baseline: how many times as fast ours is."""
    with style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        bars = [
            Bar(row, name, ratio)
            for row in rows
            for name in baselines(rows)
            if (ratio := row.ratio(name)) is not None
        ]
        names = baselines(rows)
        figure = Figure(figsize=(WIDTH, 0.9 + 0.21 * len(bars)))
        ax = figure.subplots()
        places = [-i - 0.5 * _groups_before(bars, i) for i in range(len(bars))]
        for color, name in zip(SERIES, names, strict=False):
            chosen = [i for i, bar in enumerate(bars) if bar.baseline == name]
            ax.barh(
                [places[i] for i in chosen],
                [bars[i].ratio - 1 for i in chosen],
                left=1,
                height=0.8,
                color=color,
                label=f"against {name}",
            )
        for place, (_, _, ratio) in zip(places, bars, strict=True):
            side = 1 if ratio >= 1 else -1
            ax.annotate(
                f"{ratio:.3g}x",
                (ratio, place),
                (4 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                fontsize=8,
            )
        ax.set_yticks(places, [bar.row.label for bar in bars], fontsize=8)
        ax.set_xscale("log")
        ax.margins(x=0.12, y=0.01)
        ax.axvline(1, color=MUTED, linewidth=0.8)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def _groups_before(bars: list[Bar], i: int) -> int:
    """Returns how many groups of bars come before that of bar i."""
    groups = [bar.row.group for bar in bars[: i + 1]]
    return sum(a != b for a, b in itertools.pairwise(groups))


# ---- roofline ------------------------------------------------------------------------------------


def roofline(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Yields (op, contender, operations per byte, operations per second) of the forward passes."""
    for op in results.ops:
        for row in results.of(op):
            work = row.case.work
            if work is None:
                continue
            operations, nbytes = work
            for name in ("ours", "eager"):
                if name in row.timings:
                    rate = operations / row.timings[name].median
                    yield op, name, operations / nbytes, rate


def plot_roofline(
    points: list[tuple[str, str, float, float]], ceilings: dict[str, float]
) -> Figure:
    """Plots ours filled and eager hollow, below the roofs of memory, cache and arithmetic."""
    with style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        figure = Figure(figsize=(WIDTH, 4.2))
        ax = figure.subplots()
        least = min(x for _, _, x, _ in points) / 2
        most = max(*(x for _, _, x, _ in points), 10.0) * 2
        top = ceilings["operations"]
        for name, dash in (("memory", "-"), ("cache", "--")):
            ridge = top / ceilings[name]
            xs = [least, min(ridge, most), most]
            ys = [min(x * ceilings[name], top) for x in xs]
            label = f"{name}: {ceilings[name] / 1e9:,.3g} GB/s"
            ax.plot(xs, ys, color=MUTED, linestyle=dash, linewidth=1.2, label=label)
        ops = list(dict.fromkeys(op for op, *_ in points))
        for i, op in enumerate(ops):
            color = SERIES[i % len(SERIES)]
            marker = "os^Dv*"[i % 6]
            for name in ("eager", "ours"):
                chosen = [(x, y) for o, n, x, y in points if (o, n) == (op, name)]
                if chosen:
                    ax.scatter(
                        [x for x, _ in chosen],
                        [y for _, y in chosen],
                        s=30,
                        marker=marker,
                        edgecolors=color,
                        facecolors=color if name == "ours" else "none",
                        label=op if name == "ours" else None,
                        zorder=3,
                    )
        ax.annotate(
            f"{top / 1e9:,.3g}G operations/s",
            (most, top),
            (0, 4),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=8,
        )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="operations per byte",
            ylabel="operations per second",
            title="filled: ours, hollow: eager",
        )
        plain_numbers(ax.xaxis)
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(loc="outside lower center", ncols=4)
    return figure
