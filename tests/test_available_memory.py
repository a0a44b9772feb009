"""Sizes are compared with the available memory before any is allocated."""

from pathlib import Path

import pytest
import torch

from gankernels import _memory, data, games
from gankernels.games import DataSpec
from gankernels.train.blueprint import activation_bytes, blueprint, weight_bytes


def test_available():
    meminfo = dict(x.split(":") for x in Path("/proc/meminfo").read_text().splitlines())
    total = int(meminfo["MemTotal"].split()[0]) * 1024
    assert 0 < _memory.available() <= total
    assert _memory.available("meta") is None


def test_a_limit_of_the_group_counts(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    group = (str(tmp_path), "max", "current", "inactive_file")
    monkeypatch.setattr(_memory, "CGROUPS", (group,))
    assert _memory.available() == 400
    with pytest.raises(ValueError, match=r"^x=3 needs 2.0 KiB of memory or more, 400 bytes are fr"):
        _memory.require(2048, "x=3")
    (tmp_path / "max").write_text("max\n")
    assert _memory.available() > 10**6


def test_what_is_too_large():
    for size in (10**18, 2**62, 10**30):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            torch.empty(size)
        assert _memory.too_large(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert _memory.too_large(caught.value).startswith("out of memory, asking for")
    assert _memory.too_large(MemoryError()) == "out of memory"
    for defect in (RuntimeError("shapes differ"), KeyError("memory"), TypeError("x")):
        assert _memory.too_large(defect) is None


@pytest.mark.parametrize("name", games.names())
def test_a_blueprint_tells_what_a_game_takes(name):
    game_class, spec = games.get(name), DataSpec(1, 8, 10)
    state = torch.get_rng_state()
    plan = blueprint(game_class, spec, game_class.Options())
    assert torch.equal(torch.get_rng_state(), state)
    game = game_class(spec)
    assert weight_bytes(plan) == sum(p.nbytes for p in game.parameters())
    # What autograd keeps of a step of the generator, but for weights.
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    labels = torch.zeros(64, dtype=torch.long) if game.conditional else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = game.discriminator(game.generator(game.noise(64), labels), labels)
    weights = {p.untyped_storage()._cdata for p in game.parameters()}
    real = sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in weights) / 64
    del loss
    assert 0.4 * real < activation_bytes(plan) < 1.6 * real


def test_a_game_that_reads_its_weights_has_no_blueprint():
    class Reads(games.get("gan")):
        def make_generator(self):
            generator = super().make_generator()
            float(next(generator.parameters()).sum())
            return generator

    assert blueprint(Reads, DataSpec(1, 8, 10), Reads.Options()) is None
    Reads(DataSpec(1, 8, 10))


def test_images_that_would_not_fit_are_not_resized():
    with pytest.raises(
        ValueError, match=r"images of size 100000: needs 17,970,000,000,000 bytes of memory"
    ):
        data.load("digits", size=100_000)
