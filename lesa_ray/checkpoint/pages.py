"""Memory for what is read: in huge pages where the system has them.

Fresh memory costs a page fault for every 4 KiB at its first touch, which takes several times as long as copying the
bytes from the page cache, and longer than a fast disk or network needs to bring them. With pages of 2 MiB there is a
fault for every 512. Linux gives them to whoever asks, by default; PyTorch's own allocator asks only if
THP_MEM_ALLOC_ENABLE was set before the process began.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LARGE = 4 * 2**20


def empty_bytes(nbytes: int) -> torch.Tensor:
    """Uninitialised memory, (nbytes,) of uint8; what is large is given back to the system with the last view of it."""
    import torch

    if nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
