"""The memory that a unit may take, and giving back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

UNIT_SHARE = 0.8
"""Of the free memory that one unit takes by default; the rest is for its worker's own and for the page cache."""
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 4 * 2**20


def free_memory() -> int:
    """Bytes that this process can still take without swapping: the machine's, or its control group's where that has a
    limit (a container, a Kubernetes pod)."""
    with open("/proc/meminfo", encoding="ascii") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    for limit_file, used_file in (
        ("memory.max", "memory.current"),  # control groups, version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit_file, used_file))
            free = min(free, limit - used)
    return max(free, 0)


def default_budget() -> int | None:
    """The host memory of a unit that was given none; None where the system does not say what is free."""
    try:
        return int(UNIT_SHARE * free_memory())
    except (OSError, StopIteration):
        return None


def return_freed_memory() -> None:
    """Let glibc give tensors of 4 MiB or more back to the system when they are freed.

    By itself it moves that bound up to 32 MiB as such blocks are freed, and then keeps them, by thread: a unit whose
    layers take 6 MB stayed 100 MB larger than what it held (measured). Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _LARGE)
