"""Pages: one file, valid, escaped, without external resources."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gankernels._html import SERIES, WIDTH, Page, format_value, style

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that elements nest; keeps attributes and, of every element, its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [data for name, data in self.texts if name == tag and data.strip()]


def png(width=6, height=4):
    file = io.BytesIO()
    Image.fromarray(np.arange(width * height, dtype=np.uint8).reshape(height, width)).save(
        file, "PNG"
    )
    return file.getvalue()


def drawing(label="real"):
    with style():
        figure = Figure(figsize=(WIDTH, 2))
        ax = figure.subplots()
        ax.plot([0, 1], [1, 2], label=label)
        ax.legend()
    return figure


@pytest.fixture
def page():
    page = Page("a <b> & c")
    page.facts({"it/s": 31.25, "<i>": "</dd>", "steps": 12000, "seed": None, "ema": True})
    page.section("<h3>")
    page.text("</p><script>alert(1)</script>")
    page.table(["op", "ours"], [("<td>", 1.5), ("b", 10.25)], highlight="ours", caption="<u>")
    page.figure(drawing("<g> $x$ & y"), alt='a "curve"', caption="</figcaption>")
    page.figure(drawing(), alt="another")
    page.figure(png(), alt="<img>", width=18)
    page.gallery([(png(), "first", "step 1"), (png(3, 3), "second", "<s>")])
    page.footer("<end>")
    return page


def test_elements_nest_and_text_is_escaped(page):
    reader = Reader(page.html())
    assert not {"script", "b", "i", "h3", "u", "s", "end", "link", "iframe"} & {
        tag for tag, _ in reader.elements
    }
    assert reader.text("h1") == reader.text("title") == ["a <b> & c"]
    assert reader.text("h2") == ["<h3>"]
    assert reader.text("p") == ["</p><script>alert(1)</script>"]
    assert reader.text("dt") == ["it/s", "<i>", "steps", "seed", "ema"]
    assert reader.text("dd") == ["31.25", "</dd>", "12,000", "–", "yes"]  # noqa: RUF001
    assert reader.text("figcaption") == ["</figcaption>", "step 1", "<s>"]
    assert reader.text("caption") == ["<u>"]
    assert reader.text("footer") == ["<end>"]
    assert "<g> $x$ & y" in [text.strip() for text in reader.text("text")]
    assert [image["alt"] for image in reader.all("img")] == ["<img>", "first", "second"]
    assert [svg["aria-label"] for svg in reader.all("svg")] == ['a "curve"', "another"]


def test_nothing_comes_from_elsewhere(page):
    reader = Reader(page.html())
    for tag, attributes in reader.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name)
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    assert "@import" not in page.html()
    assert "url(" not in "".join(reader.text("style"))
    policy = {m["http-equiv"]: m["content"] for m in reader.all("meta") if "http-equiv" in m}
    assert "default-src 'none'" in policy["Content-Security-Policy"]


def test_light_and_dark(page):
    html = page.html()
    assert "@media (prefers-color-scheme:dark)" in html
    defined = set(re.findall(r"--([\w-]+):#", html))
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert {"ink", "muted", "rule", "series-1"} <= used <= defined
    # No color of the light page is left in a figure, where the dark one could not replace it.
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not set(re.findall(r"#[0-9a-f]{6}\b", figures)) & {*SERIES, "#1f2430", "#5a6373"}
    assert "#000000" not in figures


def test_ids_are_unique_and_found(page):
    reader = Reader(page.html())
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page.html())
    assert used
    assert set(used) <= set(ids)


def test_the_same_page_twice_is_the_same_text():
    texts = []
    for _ in range(2):
        page = Page("t")
        page.figure(drawing(), alt="a")
        texts.append(page.html())
    assert texts[0] == texts[1]


def test_png_keeps_its_bytes_and_says_its_size():
    page = Page("t")
    page.figure(png(), alt="own")
    page.figure(png(), alt="large", width=18)
    own, large = Reader(page.html()).all("img")
    assert base64.b64decode(own["src"].partition(",")[2]) == png()
    assert (own["width"], own["height"], own.get("class")) == ("6", "4", None)
    assert (large["width"], large["height"], large["class"]) == ("18", "12", "enlarged")


def cells(columns, rows, **more):
    page = Page("t")
    page.table(columns, rows, **more)
    reader = Reader(page.html())
    return reader, reader.all("th")[: len(columns)], reader.all("td")


def test_numbers_stand_right_with_their_points_in_line():
    rows = [("a", 12.5, "4.1x", "(64,128)"), ("b", None, "10x", "x"), ("c", 3.0, "-2", "y")]
    reader, heads, data = cells(["", "ms", "ratio", "shape"], rows)
    assert [head.get("class") for head in heads] == [None, "number", "number", None]
    assert [cell.get("class") for cell in data[:3]] == ["number", "number", None]
    texts = reader.text("td")
    assert texts[0] == "12.5"
    assert texts[6] == "3\u2008\u2007"  # a point and a digit that are not there
    assert texts[3].startswith("–")  # noqa: RUF001
    assert texts[1] == "4.1x"
    assert [head for head in reader.all("th") if head["scope"] == "row"] == [{"scope": "row"}] * 3


def test_the_highlighted_column():
    _, heads, data = cells(["op", "eager", "ours"], [("a", 1, 2), ("b", 3, 4)], highlight="ours")
    assert [head.get("class") for head in heads] == [None, "number", "number highlight"]
    assert [cell["class"] for cell in data] == ["number", "number highlight"] * 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12345.678, "12,346"), (1e-7, "1e-07"), (False, "no"), ("1e3", "1e3"),
     (float("nan"), "nan"), (float("inf"), "inf")],
)  # fmt: skip
def test_format_value(value, text):
    assert format_value(value) == text


def test_writes_in_place_of_the_old_one(tmp_path):
    path = tmp_path / "new" / "page.html"
    for title in ("first", "second é \ud800"):  # half of a surrogate pair is no text
        Page(title).write(path)
    text = path.read_bytes().decode("utf-8")
    assert "<title>second é ?</title>" in text
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_errors():
    page = Page("t")
    with pytest.raises(TypeError, match="a matplotlib Figure or the bytes of a PNG, got str"):
        page.figure("samples.png", alt="x")
    with pytest.raises(ValueError, match="bytes of a PNG file"):
        page.figure(b"GIF89a", alt="x")
    for image in (png(), drawing()):
        with pytest.raises(ValueError, match="alt must describe"):
            page.figure(image, alt=" ")
    with pytest.raises(ValueError, match="a row has 1 values for 2 columns"):
        page.table(["a", "b"], [(1,)])
    with pytest.raises(ValueError, match=r"highlight must be one of \['a'\], got 'b'"):
        page.table(["a"], [(1,)], highlight="b")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install gankernels\[train\]"), style():
        pass
