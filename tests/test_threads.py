"""The number of threads respects a container's quota."""

import os

import pytest
import torch

from gankernels import _threads as cpus

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ALL),
        ({"cpu.max": "max 100000\n"}, ALL),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_quota(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpus.available(tmp_path) == expected


def test_threads_are_lowered_never_raised_and_given_back(monkeypatch):
    chosen = [8]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(cpus, "available", lambda: 3)
    with cpus.bound_threads():
        assert (chosen, cpus.threads()) == ([8, 3], 3)
    assert chosen == [8, 3, 8]
    with pytest.raises(KeyError), cpus.bound_threads():
        raise KeyError
    assert chosen == [8, 3, 8, 3, 8]
    with cpus.bound_threads():
        torch.set_num_threads(5)  # somebody else's wish
    assert chosen[-1] == 5
    monkeypatch.setattr(cpus, "available", lambda: 16)
    with cpus.bound_threads():
        assert cpus.threads() == 5
    assert chosen == [8, 3, 8, 3, 8, 3, 5]
