"""Formats results as tables, and tables as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gankernels.bench.results import Results, Row
from gankernels.bench.timing import Timing

#: The title of the table of games; that of an op's table is the name of the op.
TRAINING = "training"
#: The columns that contain words; all others contain numbers.
WORDS = ("input", "pass", "game")


def describe(results: Results) -> Iterator[str]:
    """Yields the lines of all tables."""
    env = results.environment
    where = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads, {env['capability']}"
    yield f"{where}; torch {env['torch']}, gankernels {env['gankernels']}, {env['date']}"
    for title, columns, rows in tables(results):
        yield ""
        yield title
        yield from aligned([columns, *rows])
    if noisy := results.noisy:
        yield ""
        yield noisy


def tables(results: Results) -> Iterator[tuple[str, list[str], list[list[str | None]]]]:
    """Yields (title, columns, rows) of every op and of the games.

    Numbers are formatted as text, missing ones are None. A ratio is how many times as fast ours is.
    """
    for op in results.ops:
        rows = results.of(op)
        names = baselines(rows)
        bytes_count = any(row.clones is not None for row in rows)
        columns = ["input", "pass", "ours ms", *(f"{name} ms" for name in names)]
        columns += [*(f"x {name}" for name in names), "noise"]
        columns += ["clones", "fewest"] if bytes_count else []
        body: list[list[str | None]] = []
        for row in rows:
            line: list[str | None] = [row.case.input, row.case.what]
            line += [milliseconds(row.timings.get(name)) for name in ("ours", *names)]
            line += [times(row.ratio(name)) for name in names] + [percent(row.spread)]
            if bytes_count:
                line += [digits(row.clones), digits(row.case.fewest_clones)]
            body.append(line)
        yield op, columns, body
    if games := results.training:
        yield (
            TRAINING,
            ["game", "ours it/s", "eager it/s", "x eager", "noise"],
            [
                [
                    row.label,
                    *(per_second(row.timings.get(name)) for name in ("ours", "eager")),
                    times(row.ratio("eager")),
                    percent(row.spread),
                ]
                for row in games
            ],
        )


def baselines(rows: Sequence[Row]) -> list[str]:
    """The contenders other than ours, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.baselines))


def aligned(rows: Sequence[Sequence[str | None]]) -> Iterator[str]:
    """Yields rows of equal length as aligned columns: words to the left, numbers to the right."""
    texts = [["-" if cell is None else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [
            text.ljust(width) if column in WORDS else text.rjust(width)
            for text, width, column in zip(row, widths, texts[0], strict=True)
        ]
        yield "  ".join(["", *cells]).rstrip()


def milliseconds(timing: Timing | None) -> str | None:
    return None if timing is None else digits(timing.median * 1e3)


def per_second(timing: Timing | None) -> str | None:
    return None if timing is None else digits(1 / timing.median)


def times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{digits(ratio)}x"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def digits(value: float | None) -> str | None:
    """Formats with three significant digits and without an exponent."""
    if value is None:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
