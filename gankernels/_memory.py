"""Checks for free memory in advance: Linux overcommits memory, and then kills processes."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
#: A container's memory in both versions of cgroups: the folder, the files with its limit and its
#: usage, and the name of the reclaimable part of the usage.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available(device: str | torch.device = "cpu") -> int | None:
    """The bytes that this process can still allocate on a device; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    if device.type != "cpu":
        return None
    bounds = []
    if told := re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE):
        bounds.append(int(told[1]) * 1024)
    for folder, *names, cached in CGROUPS:
        most, used = (_text(Path(folder, name)).strip() for name in names)
        if most.isdigit() and used.isdigit():  # "max" without a limit
            told = re.search(rf"^{cached} (\d+)$", _text(Path(folder, "memory.stat")), re.MULTILINE)
            bounds.append(int(most) - int(used) + (int(told[1]) if told else 0))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and (pages := _text("/proc/self/statm").split()):
        bounds.append(limit - int(pages[0]) * resource.getpagesize())
    return max(min(bounds), 0) if bounds else None


def require(needed: int, what: str, device: str | torch.device = "cpu") -> None:
    """Raises ValueError, beginning with `what`, if there is less free memory than `needed`."""
    free = available(device)
    if free is not None and needed > free:
        raise ValueError(f"{what} needs {size(needed)} of memory or more, {size(free)} are free")


def exhausted(error: BaseException) -> bool:
    """Whether it reports that memory is exhausted; PyTorch has a type for that only on GPUs."""
    text = str(error).split("\n")[0]
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search("allocate memory|out of memory", text))
    )


def too_large(error: BaseException) -> str | None:
    """A message for an error about a size or a number that was too large, else None."""
    text = str(error).strip().split("\n")[0]
    if exhausted(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
        return f"out of memory, asking for {asked[1]}" if asked else "out of memory"
    if isinstance(error, OverflowError) or (
        isinstance(error, (RuntimeError, TypeError)) and re.search("overflow", text, re.IGNORECASE)
    ):
        return f"a number is too large: {text}"
    return None


def size(count: int) -> str:
    """A number of bytes in words."""
    count = min(count, 2**70)
    power = min(max(count.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:,.{min(power, 1)}f} {UNITS[power]}"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
