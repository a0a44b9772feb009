"""What the README and docs/ tell people to type has to work, and links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in
         (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}


def test_there_are_blocks():
    assert BLOCKS["README.md"]
    assert sum(map(bool, BLOCKS.values())) > 5


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_python_blocks_run(page):
    """From top to bottom, as one script."""
    namespace = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), namespace)


def test_commands_exist():
    from gankernels.cli import main

    commands = set(re.findall(r"^gankernels (\w+)", "\n".join(TEXTS.values()), re.MULTILINE))
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(TEXTS.values())
    targets = set(re.findall(r"^make (\w+)|`make (\w[\w-]*)`", text, re.MULTILINE))
    assert targets
    for target in map("".join, targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def anchors(text):
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        assert not target.startswith("/"), target
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        path = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Such as `benchmarks/results/memory.json`; not those that a command of the page writes."""
    names = re.findall(
        r"`((?:benchmarks|csrc|docs|examples|gankernels|tests)/[\w/.-]+)`", TEXTS[page]
    )
    for name in names:
        assert (ROOT / name).exists() or list(ROOT.glob(name + ".*")), name


def test_every_page_is_listed():
    for name in PAGES:
        if name.startswith("docs/") and name != "docs/README.md":
            assert f"({Path(name).name})" in TEXTS["docs/README.md"], name


# ---- docs/building.md ----------------------------------------------------------------------------

HEADINGS = re.findall(r"^### `(.*)`$", TEXTS["docs/building.md"], re.MULTILINE)


def literals(name):
    """All strings of a Python file, the parts of f-strings one by one."""
    nodes = ast.walk(ast.parse((ROOT / name).read_text()))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str)]


def test_errors_of_a_build_are_said_in_these_words():
    sources = (
        "setup.py", "gankernels/__init__.py", "gankernels/_library.py", ".ci/prepare.py"
    )  # fmt: skip
    spoken = [text for source in sources for text in literals(source)]
    for heading in HEADINGS:
        if heading == "no kernel image is available":  # CUDA says so
            continue
        for part in filter(None, map(str.strip, heading.split("…"))):
            assert any(part in text for text in spoken), part


def test_every_error_of_setup_has_its_cure():
    errors = [text for text in literals("setup.py") if text.startswith("gankernels: ")]
    assert len(errors) == 7
    for error in errors:
        assert any(error.startswith(heading.split("…")[0].strip()) for heading in HEADINGS), error
