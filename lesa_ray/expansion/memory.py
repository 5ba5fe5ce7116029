"""The memory that a unit may take, and giving back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes

from lesa_ray.limits import free_memory

UNIT_SHARE = 0.8
"""Of the free memory that one unit takes by default; the rest is for its worker's own and for the page cache."""
INTERPRETER_BYTES = 600 * 2**20
"""A process with torch imported, beside what a unit takes."""
_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 4 * 2**20


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
