"""The number of usable CPU threads: affinity and cgroup quota."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = CGROUP) -> int:
    """The number of processors that affinity and the container's quota (cgroup v2 or v1) allow."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return count
    if not quota.isdigit() or not period.isdigit():  # "max" or -1: no quota
        return count
    return max(1, min(count, int(quota) // int(period)))


def threads() -> int:
    """The number of PyTorch's threads, but at most `available`: more would wait for each other.

    PyTorch counts the processors that it may run on, but ignores a container's quota.
    """
    return min(torch.get_num_threads(), available())


@contextmanager
def bound_threads() -> Iterator[None]:
    """Inside, PyTorch uses `threads()` threads; it has a separate number per Python thread."""
    before, most = torch.get_num_threads(), threads()
    if most < before:
        torch.set_num_threads(most)
    try:
        yield
    finally:
        if most < before and torch.get_num_threads() == most:  # no other code chose a number since
            torch.set_num_threads(before)
