"""The plots and the page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gankernels._console import describe, warn
from gankernels._files import write_atomically, write_json
from gankernels._html import SERIES, WIDTH, Page, style
from gankernels._paths import expand
from gankernels.bench.ops import OPS, PASSES, Case
from gankernels.bench.results import Results, Row
from gankernels.bench.table import TRAINING, baselines, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FILE = "index.html"
PAPER, MUTED = "#ffffff", "#5a6373"  # of _html.py's light pages

METHOD = (
    "All contenders of a row ran in turn in one process, round after round, so that a slow moment "
    "of the machine falls on all of them; the times are medians of the rounds. Noise is the "
    "largest interquartile range of ours and what it is compared with, as a share of the median: "
    "ratios that differ by less mean nothing. Calls shorter than a millisecond were repeated until "
    "one had passed. The allocator keeps large blocks (gankernels.tune_allocator), for all alike. "
    "On a GPU the clock is read after waiting for it, so launches by the host count."
)
CLONES = (
    "Clones are our time in units of x.clone(), which reads and writes the input once; fewest is "
    "the number that moves as many bytes as the pass has to, were every tensor read once. A clone "
    "of a small tensor stays in the caches, and a call costs some microseconds besides."
)
GAMES = (
    "The same trainer twice on the digits, with our kernels (ours) and with PyTorch's ops in their "
    'place (eager, use_backend("reference")): the loop, the networks and the data are the same, so '
    "the difference is the kernels'."
)


def write(results: Results, folder: str | Path) -> Path | None:
    """Write results.json, index.html and the plots as PNG; return the page's path.

    Where the page cannot be drawn there is none, and a warning.
    """
    folder = expand(folder)
    write_json(folder / "results.json", results.to_json())
    try:
        return write_page(results, folder)
    except OSError:
        raise
    except Exception as error:  # whatever a plotting library raises
        warn(f"{folder}: there are no plots, since they could not be drawn: {describe(error)}")
        return None


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html and its plots, as PNG files beside it; return the page's path."""
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
        rows = results.training if title == TRAINING else results.of(title)
        page.section(title)
        page.text(GAMES if title == TRAINING else OPS[title].baselines)
        page.table(columns, body, highlight="x eager" if "x eager" in columns else None)
        for row in rows:
            for name, why in row.errors.items():
                page.text(f"{row.case}: {name} failed: {why}")
        if "clones" in columns:
            page.text(CLONES)
        if series := sizes(rows):
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
            "Operations that a forward pass has to do, a second, against those it has to do to a "
            "byte that it has to move. The roofs were measured here: copies of a tensor beyond "
            "all caches and of one inside them, and the faster of a matrix product and a "
            "convolution in float32, whose multiply-adds count as two operations: of additions "
            "alone, as in minibatch discrimination, about half as many can be done. What stays in "
            "a cache lies above the slope of memory."
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


def sizes(rows: list[Row]) -> list[Row]:
    """Rows that differ in shape alone, and in the pass: of the dtype and layout with most shapes.

    None where there are fewer than two shapes.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if isinstance(row.case, Case):
            groups.setdefault((row.case.dtype, row.case.layout), []).append(row)
    if not groups:
        return []
    largest = max(groups.values(), key=lambda group: len({row.case.shape for row in group}))
    return largest if len({row.case.shape for row in largest}) > 1 else []


def plot_sizes(rows: list[Row]) -> Figure:
    """Every contender's time over the input's elements, a panel per pass."""
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
            for colour, name in zip(SERIES, names, strict=False):
                _curve(ax, name, colour, chosen)
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


def _curve(ax: Axes, name: str, colour: str, rows: list[Row]) -> None:
    points = [(row.case.elements, row.timings[name]) for row in rows if name in row.timings]
    if not points:
        return
    x = [elements for elements, _ in points]
    y = [[getattr(t, part) * 1e3 for _, t in points] for part in ("median", "low", "high")]
    ax.plot(x, y[0], color=colour, linestyle="-", marker="o", markersize=4, label=name)
    ax.fill_between(x, y[1], y[2], color=colour, alpha=0.2, linewidth=0)


def _limit(ax: Axes, rows: list[Row]) -> None:
    points = [
        (row.case.elements, 1e3 * row.case.fewest_clones * row.timings["clone"].median)
        for row in rows
        if row.case.fewest_clones is not None and "clone" in row.timings
    ]
    if points:
        label = "fewest bytes at a clone's speed"
        ax.plot(*zip(*points, strict=True), color=MUTED, linestyle=":", label=label)


def plain_numbers(axis: Axis) -> None:
    """Labels of a logarithmic axis: 0.1 for a power of ten, which `style` would not typeset."""
    from matplotlib.ticker import FuncFormatter, StrMethodFormatter

    def between(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        return f"{value:g}" if high < 10 * low and f"{value:.0e}"[0] in "25" else ""

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(FuncFormatter(between))


# ---- speed-up ------------------------------------------------------------------------------------


def plot_ratios(rows: list[Row]) -> Figure:
    """A bar for every case and baseline: how many times as fast ours is."""
    with style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        bars = [
            (row, name, row.ratio(name))
            for row in rows
            for name in baselines(rows)
            if row.ratio(name) is not None
        ]
        names = baselines(rows)
        figure = Figure(figsize=(WIDTH, 0.9 + 0.21 * len(bars)))
        ax = figure.subplots()
        places = [-i - 0.5 * _groups_before(bars, i) for i in range(len(bars))]
        for colour, name in zip(SERIES, names, strict=False):
            chosen = [i for i, bar in enumerate(bars) if bar[1] == name]
            ax.barh(
                [places[i] for i in chosen],
                [bars[i][2] - 1 for i in chosen],
                left=1,
                height=0.8,
                color=colour,
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
        ax.set_yticks(places, [_label(row) for row, _, _ in bars], fontsize=8)
        ax.set_xscale("log")
        ax.margins(x=0.12, y=0.01)
        ax.axvline(1, color=MUTED, linewidth=0.8)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def _label(row: Row) -> str:
    case = row.case
    return f"{case.input}, {case.what}" if isinstance(case, Case) else str(case)


def _groups_before(bars: list[tuple[Row, str, float]], i: int) -> int:
    """How many times the input changes before bar i: bars of one input stand together."""
    inputs = [getattr(row.case, "input", None) for row, _, _ in bars[: i + 1]]
    return sum(a != b for a, b in itertools.pairwise(inputs))


# ---- roofline ------------------------------------------------------------------------------------


def roofline(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """(op, contender, operations per byte, operations per second) of every forward pass."""
    for op in results.ops:
        for row in results.of(op):
            if row.case.work is None:
                continue
            operations, nbytes = row.case.work
            for name in ("ours", "eager"):
                if name in row.timings:
                    rate = operations / row.timings[name].median
                    yield op, name, operations / nbytes, rate


def plot_roofline(
    points: list[tuple[str, str, float, float]], ceilings: dict[str, float]
) -> Figure:
    """Ours filled, eager hollow, under the roofs that memory, cache and arithmetic make."""
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
            colour = SERIES[i % len(SERIES)]
            marker = "os^Dv*"[i % 6]
            for name in ("eager", "ours"):
                chosen = [(x, y) for o, n, x, y in points if (o, n) == (op, name)]
                if chosen:
                    ax.scatter(
                        *zip(*chosen, strict=True),
                        s=30,
                        marker=marker,
                        edgecolors=colour,
                        facecolors=colour if name == "ours" else "none",
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
