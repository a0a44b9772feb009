"""Every example runs."""

import re
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_two_steps(path, python):
    options = ("--steps", 2, "--batch", 4, "--width", 2)
    out = python(path, *options, env={"OMP_NUM_THREADS": 1}).stdout
    assert re.fullmatch(r"before: \d+\.\d\d it/s\nafter: \d+\.\d\d it/s\n", out)


def test_there_are_some():
    assert len(EXAMPLES) >= 2
