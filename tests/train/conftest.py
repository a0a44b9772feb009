"""A small game on a small part of the real digits, so that whole runs take a second."""

import pytest

from gankernels.data import load
from gankernels.train import start

TINY = {"size": 8, "batch_size": 16, "device": "cpu", "log_every": 20, "sample_every": 0}


@pytest.fixture
def run(tmp_path):
    """`run(game, **settings)`: a trainer on the 8x8 digits in a folder of its own."""

    def make(game="cgan", **settings):
        settings = {"out": str(tmp_path / "run"), **TINY, **settings}
        return start(game, **settings)

    return make


@pytest.fixture(scope="session")
def digits():
    return load("digits", size=8)
