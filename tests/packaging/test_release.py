"""The parts of a release agree: versions, changelog, metadata, CI."""

import re
from pathlib import Path

import gankernels as gk

ROOT = Path(__file__).resolve().parents[2]


def text(name):
    return (ROOT / name).read_text()


def test_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", gk.__version__)
    assert 'version = { attr = "gankernels._version.__version__" }' in text("pyproject.toml")
    written = text("gankernels/_version.py")
    assert re.findall(r'^__version__ = "(.*)"$', written, re.MULTILINE) == [gk.__version__]


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    number, date = re.fullmatch(r"(\S+) \((.+)\)", headings[0]).groups()
    assert number == gk.__version__
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert not any("unreleased" in heading for heading in headings[1:])


def test_oldest_versions_are_the_same_everywhere():
    project, workflow = text("pyproject.toml"), text(".github/workflows/ci.yml")
    python = re.search(r'requires-python = ">=(.*)"', project)[1]
    torch = re.search(r'"torch>=(.*?)"', project)[1]
    pythons = re.findall(r'"(.*?)"', re.search(r"python: \[(.*)\]", workflow)[1])
    assert pythons[0] == python
    assert re.search(r"torch: \[(.*)\]", workflow)[1] == f'"torch=={torch}.*", "torch"'
    assert f"OLDEST_TORCH = ({torch.replace('.', ', ')})" in text(".ci/prepare.py")
    assert f'python_version = "{python}"' in project  # of mypy
    assert f'target-version = "py{python.replace(".", "")}"' in project  # of ruff
    readme = text("README.md")
    assert f"PyTorch from {torch} on" in readme
    assert f"Python >= {python}" in readme


def test_checklists_are_the_same():
    items = [re.findall(r"^- \[ \] (.*)$", text(name), re.MULTILINE) for name in
             ("CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md")]  # fmt: skip
    assert len(items[0]) == 5
    assert [item.replace("[CHANGELOG.md](CHANGELOG.md)", "CHANGELOG.md") for item in items[0]] == (
        items[1]
    )
