"""Callbacks: progress, metrics, TensorBoard, reports, scores, and users' own."""

import math
from types import SimpleNamespace

import pytest

from gankernels.train.callbacks import Progress, time_left


@pytest.mark.parametrize(
    ("steps", "speed", "expected"),
    [
        (0, 5.0, "00:00:00"),
        (3_661, 1.0, "01:01:01"),
        (86_399, 1.0, "23:59:59"),
        (10**7, 50.0, "2 d 07:33:20"),
        (2**63 - 1, 50.0, "2,135,039,823,346 d 00:18:40"),
        (10, 0.0, "?"),
        (10, math.inf, "?"),
        (10, math.nan, "?"),
        (10, 1e-3, "02:46:40"),
    ],
)
def test_time_left(steps, speed, expected):
    assert time_left(steps, speed) == expected


def test_a_slow_run_has_a_speed(capsys):
    trainer = SimpleNamespace(step=100, config=SimpleNamespace(steps=2**62))
    progress = Progress()
    progress.bar = None
    progress.on_report(trainer, {"it_per_s": 0.0042})
    progress.on_report(trainer, {"it_per_s": 0.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "  0.0042 it/s  " in first
    assert second.endswith("0 it/s  ? left")
