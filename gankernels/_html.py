"""HTML pages in one file: no script, no requests, light or dark as the browser is set.

    page = Page("cgan on digits")
    page.facts({"step": 5000, "it/s": 31.2})
    page.section("Losses")
    with style():
        figure = Figure(figsize=(WIDTH, 3))
        figure.subplots().plot(steps, losses, label="real")
    page.figure(figure, alt="The discriminator's loss over steps", caption="faint: raw values")
    page.table(["op", "eager", "ours"], [("batch norm", 12.1, 3.4)], highlight="ours")
    page.write("report.html")

All text is escaped. Figures are made with matplotlib, which is only imported when needed.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import re
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from gankernels._files import write_atomically
from gankernels._paths import expand

#: Width of a figure in inches; on the page, text of 9 points then has the page's size.
WIDTH = 9.6

# name: (on a light page, on a dark one). The series are Okabe and Ito's colors, which stay
# distinct under every kind of color blindness; the pale ones are darkened for contrast.
_COLORS = {
    "paper": ("#ffffff", "#14171c"),
    "ink": ("#1f2430", "#e4e7ec"),
    "muted": ("#5a6373", "#9ba4b3"),
    "rule": ("#dfe3ea", "#303743"),
    "shade": ("#f4f6f9", "#1b2027"),
    "series-1": ("#0072b2", "#4fb0ea"),
    "series-2": ("#d55e00", "#ff8b4a"),
    "series-3": ("#008f68", "#35c79a"),
    "series-4": ("#b8568f", "#e39cc6"),
    "series-5": ("#9a6a00", "#e8b84a"),
}
SERIES = tuple(light for name, (light, _) in _COLORS.items() if name.startswith("series"))

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;font-weight:650;letter-spacing:-.01em;margin:0 0 1.25rem}
h2{font-size:1.15rem;font-weight:650;margin:2.75rem 0 .9rem;padding-top:1.1rem;
border-top:1px solid var(--rule)}
p{max-width:44rem;margin:.75rem 0}
figure{margin:1.25rem 0}
figcaption,caption{color:var(--muted);font-size:.875rem;text-align:left}
figcaption{margin-top:.35rem}caption{padding-bottom:.4rem}
.wide{overflow-x:auto}
.wide svg{display:block;width:100%;min-width:36rem;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit}
img{display:block;max-width:100%;height:auto;border-radius:3px}
.enlarged{image-rendering:pixelated}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(12.5rem,42%),1fr));gap:1.25rem}
.gallery figure{margin:0}.gallery img{width:100%}
table{border-collapse:collapse;font-size:.925rem}
th,td{padding:.25rem 1.1rem .25rem 0;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:baseline;min-width:9rem;overflow-wrap:anywhere}
th{font-weight:500}thead th{color:var(--muted);font-weight:400;overflow-wrap:normal}
.number{text-align:right;padding:.25rem .7rem;min-width:0;white-space:nowrap;
font-variant-numeric:tabular-nums}
.highlight{background:var(--shade);color:var(--ink);font-weight:650}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.9rem 1.5rem;
margin:0}
dt{color:var(--muted);font-size:.875rem}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--muted);font-size:.875rem}
@media print{main{max-width:none;padding:0}figure,tr{break-inside:avoid}}
""".replace("\n", "")

# Blocks all requests of a page to other places.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Page:
    """A page that grows from top to bottom; every method but `write` adds to its end.

    Args:
        title: the heading, and the name of the browser's tab.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._body: list[str] = []
        self._ids = itertools.count(1)

    def section(self, title: str) -> None:
        """Add a heading."""
        self._body.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._body.append(f"<p>{escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        """Add lines without formatting."""
        self._body.append(f"<pre>{escape(text)}</pre>")

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add names with their values, side by side. None is shown as a dash."""
        items = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(format_value(value))}</dd></div>"
            for name, value in facts.items()
        )
        self._body.append(f"<dl>{''.join(items)}</dl>")

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        highlight: str | None = None,
        caption: str = "",
    ) -> None:
        """Add a table whose first column names the rows.

        A column in which every value is a number, or text that begins like one ("4.1x"), is right
        aligned; floats have four significant digits and aligned decimal points.

        Args:
            columns: the headings of the columns.
            rows: a value for each column; None is shown as a dash.
            highlight: the heading of the column to emphasize.

        Raises:
            ValueError: a row of another length, or no column of the name `highlight`.
        """
        rows = [list(row) for row in rows]
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a row has {len(row)} values for {len(columns)} columns: {row}")
        if highlight is not None and highlight not in columns:
            raise ValueError(f"highlight must be one of {list(columns)}, got {highlight!r}")
        cells = [_column([row[i] for row in rows]) for i in range(len(columns))]
        classes = [
            _class(number and "number", name == highlight and "highlight")
            for name, (_, number) in zip(columns, cells, strict=True)
        ]
        head = "".join(
            f'<th scope="col"{class_}>{escape(name)}</th>'
            for name, class_ in zip(columns, classes, strict=True)
        )
        body = []
        for texts in zip(*(texts for texts, _ in cells), strict=True):
            first, *others = zip(texts, classes, strict=True)
            body.append(f'<tr><th scope="row"{first[1]}>{escape(first[0])}</th>')
            body += (f"<td{class_}>{escape(text)}</td>" for text, class_ in others)
            body.append("</tr>")
        named = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._body.append(
            f'<div class="wide"><table>{named}<thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def figure(self, image: Any, *, alt: str, caption: str = "", width: int | None = None) -> None:
        """Add a picture.

        Args:
            image: a matplotlib Figure, which becomes SVG as wide as the page, or the bytes of a
                PNG file.
            alt: a description, for readers who cannot see the picture.
            caption: the line under it.
            width: the width of a PNG in CSS pixels, at most the page's; by default its own width.

        Raises:
            TypeError, ValueError: another kind of image, or an empty `alt`.
        """
        if isinstance(image, bytes):
            drawn = _img(image, alt, width)
        elif hasattr(image, "savefig"):
            drawn = f'<div class="wide">{_svg(image, alt, f"figure-{next(self._ids)}-")}</div>'
        else:
            raise TypeError(
                f"image must be a matplotlib Figure or the bytes of a PNG, "
                f"got {type(image).__name__}"
            )
        self._body.append(_figure(drawn, caption))

    def gallery(self, images: Iterable[tuple[bytes, str, str]]) -> None:
        """Add small PNG pictures side by side, each as (bytes, alt, caption)."""
        figures = (_figure(_img(image, alt), caption) for image, alt, caption in images)
        self._body.append(f'<div class="gallery">{"".join(figures)}</div>')

    def footer(self, text: str) -> None:
        """Add a last line in small print."""
        self._body.append(f"<footer>{escape(text)}</footer>")

    def html(self) -> str:
        """The whole page."""
        light, dark = (
            "".join(f"--{name}:{pair[i]};" for name, pair in _COLORS.items()) for i in (0, 1)
        )
        body = "\n".join(self._body)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(self.title)}</title>\n<style>:root{{{light}}}"
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{escape(self.title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page atomically: readers of `path` see the old page or the new one."""
        content = self.html().encode("utf-8", errors="replace")
        write_atomically(expand(path), lambda file: file.write(content))


#: Held while matplotlib's settings are changed: they are global to the process, and a second thread
#: would restore those of the first.
_STYLING = threading.RLock()


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for figures of a page, for the `with` block that makes or draws one.

    They are matplotlib's defaults and ours, and ignore matplotlibrc: with `text.usetex`, for
    example, no figure can be drawn without LaTeX. Raises ImportError if matplotlib is missing.
    """
    matplotlib = import_matplotlib()
    from cycler import cycler

    ink, muted, rule = (_COLORS[name][0] for name in ("ink", "muted", "rule"))
    settings = {
        "axes.axisbelow": True,
        "axes.edgecolor": rule,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": muted,
        "axes.prop_cycle": cycler(linestyle=["-", (0, (4, 2))]) * cycler(color=SERIES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": ink,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "none",
        "font.size": 9,
        "grid.color": rule,
        "grid.linewidth": 0.7,
        "legend.borderaxespad": 0,
        "legend.borderpad": 0.3,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "lines.linewidth": 1.6,
        "text.color": ink,
        "text.parse_math": False,  # names may have a $
        "xtick.color": rule,
        "xtick.labelcolor": muted,
        "ytick.color": rule,
        "ytick.labelcolor": muted,
    }
    with _STYLING, matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def import_matplotlib() -> Any:
    """The module, also if the user's backend or settings for it are invalid.

    Raises ImportError if it is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("reports need matplotlib: pip install gankernels[train]") from error
    except Exception:  # MPLBACKEND is not a backend, or matplotlibrc is not text
        # The partly imported module would be taken for the whole.
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _without_settings():
            import matplotlib
    return matplotlib


@contextmanager
def _without_settings() -> Iterator[None]:
    names = {"MPLBACKEND": None, "MATPLOTLIBRC": os.devnull}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update({name: value for name, value in names.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def format_value(value: Any) -> str:
    """A value for a reader: four significant digits of a float, a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _column(values: list[Any]) -> tuple[list[str], bool]:
    """The texts of a column, and whether all are numbers."""
    texts = [format_value(value) for value in values]
    present = [text for text, value in zip(texts, values, strict=True) if value is not None]
    numbers = bool(present) and all(re.match(r"[-+]?(\d|inf$|nan$)", text) for text in present)
    if not numbers or not any(isinstance(value, float) for value in values):
        return texts, numbers
    # Missing decimals are filled with spaces as wide as a digit and a point.
    decimals = [len(text.partition(".")[2]) for text in texts]
    longest = max(decimals)
    return [
        text + ("\u2008" if longest and not own else "") + "\u2007" * (longest - own)
        for text, own in zip(texts, decimals, strict=True)
    ], True


def _class(*names: str | bool) -> str:
    chosen = " ".join(str(name) for name in names if name)
    return f' class="{chosen}"' if chosen else ""


def _figure(drawn: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{drawn}{below}</figure>"


def _check_alt(alt: str) -> None:
    if not alt.strip():
        raise ValueError("alt must describe the picture, got an empty text")


def _img(png: bytes, alt: str, width: int | None = None) -> str:
    _check_alt(alt)
    own_width, height = png_size(png)
    shown = own_width if width is None else width
    class_ = _class(shown > own_width and "enlarged")
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt)}"'
        f' width="{shown}" height="{round(height * shown / own_width)}"{class_}>'
    )


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG file. Raises ValueError for anything else."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"image must be the bytes of a PNG file, got {png[:8]!r}...")
    return struct.unpack(">II", png[16:24])


def _svg(figure: Any, alt: str, prefix: str) -> str:
    """A figure as an <svg> element whose ids begin with `prefix`, in the page's own colors."""
    import matplotlib

    _check_alt(alt)
    file = io.StringIO()
    # Text stays text, in the page's font; ids repeat from run to run.
    with style(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gankernels"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    for name, (light, _) in _COLORS.items():
        text = re.sub(rf"(stroke|fill): {light}\b", rf"\1: var(--{name})", text)
    (viewbox,) = re.findall(r'viewBox="[^"]*"', text)[:1]
    opened = f'<svg {viewbox} xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    opened += f' aria-label="{escape(alt)}">'
    return opened + text[text.index(">") + 1 :]
