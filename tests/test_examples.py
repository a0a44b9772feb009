"""Every example runs."""

import re
from pathlib import Path

import pytest

EXAMPLES = {
    path.stem: path for path in (Path(__file__).resolve().parents[1] / "examples").glob("*.py")
}


@pytest.mark.parametrize("name", ["dcgan", "wgan_gp"])
def test_before_and_after(name, python):
    options = ("--steps", 2, "--batch", 4, "--width", 2)
    out = python(EXAMPLES[name], *options, env={"OMP_NUM_THREADS": 1}).stdout
    assert re.fullmatch(r"before: \d+\.\d\d it/s\nafter: \d+\.\d\d it/s\n", out)


def test_own_game(python, tmp_path):
    options = ("--steps", 3, "--batch", 4, "--out", tmp_path / "run")
    out = python(EXAMPLES["own_game"], *options, env={"OMP_NUM_THREADS": 1}).stdout
    assert out == f"{tmp_path}/run/samples.png shows samples at step 3\n"
    assert (tmp_path / "run/samples.png").exists()
    assert (tmp_path / "run/checkpoints/step_00000003.pt").exists()


def test_each_is_run_here():
    assert EXAMPLES.keys() == {"dcgan", "wgan_gp", "own_game"}
