"""Losses: the same means and errors however rare the reports, in bounded memory."""

import math

import pytest
import torch
from torch import Tensor

from gankernels.train import DivergenceError
from gankernels.train.losses import GRADIENT_NORM, MOST_KEPT, Losses

OFTEN = [("critic", "real"), ("critic", "fake")]
SELDOM = [("critic", "real"), ("critic", "penalty"), ("critic", GRADIENT_NORM)]


def filled(count, **options):
    """Losses of so many iterations, every third of which has other terms, and all values."""
    torch.manual_seed(0)
    losses, seen = Losses(**options), []
    for step in range(1, count + 1):
        names = OFTEN if step % 3 else SELDOM
        seen.append((names, torch.randn(len(names)) + 1))
        losses.add(step, list(names), seen[-1][1].clone())
    return losses, seen


@pytest.mark.parametrize("count", [1, 3, MOST_KEPT - 1, MOST_KEPT, 2 * MOST_KEPT + 10])
def test_means(count):
    losses, seen = filled(count)
    expected = {}
    for names, values in seen:
        for (player, term), value in zip(names, values.tolist(), strict=True):
            expected.setdefault(f"{player}/{term}", []).append(value)
    assert losses.take() == pytest.approx({k: sum(v) / len(v) for k, v in expected.items()})
    assert losses.take() == {}


def test_memory_is_bounded():
    losses, _ = filled(3 * MOST_KEPT + 10)
    assert len(losses.history) == 10
    assert {len(s.total) for s in losses.sums.values()} == {2, 3}
    kept = [s.total.untyped_storage().nbytes() for s in losses.sums.values()]
    assert max(kept) <= 3 * 4


@pytest.mark.parametrize("before", [0, MOST_KEPT, 2 * MOST_KEPT + 10], ids=["new", "one", "two"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_that_is_not_finite_is_named(before, value):
    losses, _ = filled(before)
    losses.add(before + 1, OFTEN, torch.zeros(2))
    losses.add(before + 2, SELDOM, torch.tensor([0.0, value, math.nan]))
    losses.add(before + 3, OFTEN, torch.tensor([math.nan, -value]))
    for step in range(before + 4, before + 4 + MOST_KEPT):
        names = OFTEN if step % 2 else SELDOM
        losses.add(step, names, torch.full((len(names),), -value))
    message = f"step {before + 2}: the loss term 'penalty' of player 'critic' is {value}$"
    for ask in (losses.check, losses.take, losses.take):
        with pytest.raises(DivergenceError, match=message):
            ask()


def test_a_gradient_is_told_from_a_loss():
    losses, _ = filled(MOST_KEPT)
    losses.add(MOST_KEPT + 1, SELDOM, torch.tensor([0.0, 0.0, math.inf]))
    with pytest.raises(DivergenceError, match="the gradient of player 'critic' is inf"):
        losses.take()


def test_adding_does_not_wait_for_the_device(monkeypatch):
    def wait(*_):
        raise AssertionError("somebody waits")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            patch.setattr(Tensor, name, wait)
        losses = Losses()
        for step in range(MOST_KEPT):
            losses.add(step, OFTEN, torch.zeros(2))
    assert losses.history == []


def test_every_value_is_averaged_over_the_processes_once():
    def average(tensors):
        for tensor in tensors:
            tensor.mul_(0.5)

    losses, seen = filled(MOST_KEPT + 1, average=average)
    losses.check()
    mean = sum(values[0].item() for _, values in seen) / len(seen)
    assert losses.take()["critic/real"] == pytest.approx(0.5 * mean)
