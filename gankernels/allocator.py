"""Keeps the C library from returning large blocks to the kernel after every use."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def tune_allocator() -> bool:
    """Makes glibc's malloc reuse large blocks instead of mapping and zeroing new ones.

    By default every block over 32 MB is mapped when allocated and unmapped when freed, so each
    large activation pays a page fault per 4 KiB on first touch; on CPU that can double the time of
    a training step. This sets ``M_MMAP_MAX=0``, ``M_TRIM_THRESHOLD=-1`` and ``M_TOP_PAD=256 MiB``
    for the whole process, at any time. Freed memory then stays with the process, so its resident
    size stays near its peak. The command line calls this; importing the package does not.

    Returns:
        Whether it was set: False if the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20))
    return sum(libc.mallopt(parameter, value) for parameter, value in settings) == len(settings)
