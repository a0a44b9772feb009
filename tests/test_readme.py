"""The commands, code, links and figures of the README and docs/ are correct."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in
         (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")),
          ROOT / "benchmarks" / "ROOFLINE.md")}  # fmt: skip
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}
DIFF = re.search(r"```diff\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]


def test_there_are_blocks():
    assert sum(map(bool, BLOCKS.values())) > 5


def test_readme_is_short():
    assert TEXTS["README.md"].count("\n") <= 120


def test_readme_diff_runs_before_and_after(capsys):
    lines = DIFF.splitlines()
    assert {line[:1] for line in lines} <= {"+", "-", " ", ""}
    for sign in "-+":
        code = "\n".join(line[1:] for line in lines if line[:1] in (sign, " ", ""))
        exec(compile(code, "README.md", "exec"), {})
    (promised,) = re.findall(r"print\)  # (.*) \.\.\.", DIFF)
    assert capsys.readouterr().out.startswith(promised)


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
    targets = set(re.findall(r"^make (\w[\w-]*)|`make (\w[\w-]*)", text, re.MULTILINE))
    assert targets
    for target in map("".join, targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def anchors(text):
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", TEXTS[page]):
        target = "".join(target)
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
            assert f"({name.removeprefix('docs/')})" in TEXTS["docs/README.md"], name


# ---- figures -------------------------------------------------------------------------------------


def rows(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def rounded(value):
    """As the pages do it: 1.0, 6.6, 19."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def cells(page, first):
    """The rows of a page's first table whose head has `first`, each a list of cells."""
    lines = TEXTS[page].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and first in line)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]


def test_figures_of_batch_norm():
    page = "docs/benchmarks.md"
    results = {row["case"]: row for row in rows("batch_norm_leaky_relu")}
    shape = None
    for what, layout, *figures in cells(page, "| x | layout |"):
        shape = what or shape
        size, dtype = re.fullmatch(r"\(([\d,]+)\) (\w+)", shape).groups()
        for of, figure in zip(("forward", "backward", "penalty"), figures, strict=True):
            case = f"{size.replace(',', 'x')} {dtype} {layout or 'contiguous'} {of}"
            row = results.pop(case)
            expected = f"{rounded(row['times_eager'])}x"
            if layout:
                clones = row["seconds"]["ours"] / row["seconds"]["clone"]
                expected += f" ({rounded(clones)})"
            assert figure == expected, case
    assert not results


def test_figures_of_minibatch_stddev():
    results = {row["case"]: row for row in rows("minibatch_stddev")}
    size = None
    for what, dtype, *figures in cells("docs/benchmarks.md", "| x | | forward"):
        size = what.strip("()").replace(",", "x") or size
        passes = ("forward", "forward + backward", "penalty step")
        for of, figure in zip(passes, figures, strict=True):
            case = f"{size} {dtype} {of}"
            assert figure == f"{rounded(results.pop(case)['times_eager'])}x", case
    assert not results


def test_figures_of_minibatch_discrimination():
    results = {tuple(row["case"]): row["seconds"] for row in rows("minibatch_discrimination")}
    for size, *figures, _ in cells("docs/benchmarks.md", "| m | against broadcasting"):
        seconds = results.pop(ast.literal_eval(size))
        for slow, figure in zip(("broadcasting", "cdist"), figures, strict=True):
            if slow in seconds:
                assert figure == f"{rounded(seconds[slow] / seconds['ours'])}x", size
    assert not results


@pytest.mark.parametrize(
    ("page", "first", "baselines"),
    [
        ("docs/benchmarks.md", "| | script, float32", ("script", "memory", "memory_malloc")),
        ("README.md", "| | ours, float32", ("memory_malloc",)),
    ],
)
def test_figures_of_training(page, first, baselines):
    results = {(row["model"], row["contender"]): row for row in rows("training")}
    for model, *figures in cells(page, first):
        expected = [
            f"{rounded(results[model, ours][f'times_{baseline}'])}x"
            for baseline in baselines
            for ours in ("fp32", "bf16")
        ]
        assert figures == expected, model


def test_figures_of_the_readme():
    batch_norm = {row["case"]: row["times_eager"] for row in rows("batch_norm_leaky_relu")}
    contiguous, channels_last = (
        rounded(batch_norm[f"64x128x32x32 float32 {layout} penalty"])
        for layout in ("contiguous", "channels_last")
    )
    (resnet,) = (
        r["times_faster"]["penalty step"] for r in rows("fuse") if r["network"] == "ResNet"
    )
    text = " ".join(TEXTS["README.md"].split())
    assert f"{contiguous}x as fast as eager PyTorch, and {channels_last}x in channels_last" in text
    assert f"A whole ResNet critic becomes {resnet:.2f}x as fast" in text


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
