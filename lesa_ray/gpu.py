"""A process's share of a GPU: how large it is, keeping to it, what is free of it, and what it means when it is full.

Where several processes share a GPU each has its share of it, held by PyTorch's allocator (`limit_device`), and what is
free is what is left of that share: what a process decides by it then does not depend on who else is at work, and
nobody takes what another has counted on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lesa_ray.errors import FullError

CONTEXT_BYTES = 600 * 2**20
"""What CUDA and its libraries take on a GPU for each process, roughly."""
DEVICE_SHARE = 0.85
"""Of a GPU's free memory that a unit fills; the rest is for a layer or two, products in flight, the allocator's
rounding and the library's own."""


def share_bytes(total: int, share: float | None) -> int:
    """Of a GPU of `total` bytes those that a process with that share of it (None: all of it) has for its tensors: its
    context, which PyTorch's allocator knows nothing of, comes out of its share."""
    whole = int(total * (1.0 if share is None else min(share, 1.0)))
    return max(whole - CONTEXT_BYTES, whole // 2)


def gpu_memory(share: float | None) -> int:
    """The same of this process's GPU, whatever others have taken by now: what is refused must not depend on the
    moment."""
    import torch

    return share_bytes(torch.cuda.get_device_properties(0).total_memory, share)


def allowed_memory(device: str) -> int:
    """Bytes of a GPU that this process may take (`limit_device`), whatever others have taken by now."""
    import torch

    where = torch.device(device).index or 0
    total: int = torch.cuda.get_device_properties(where).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(where))


def limit_device(share: float) -> None:
    """Keep this process to its `share` of the GPU, in (0, 1]; more than `share_bytes` raises
    `torch.OutOfMemoryError`."""
    import torch

    if 0 < share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share_bytes(total, share) / total, 0)


def unseeing() -> str:
    """What is said of a PyTorch that does not see a GPU which is there."""
    import torch

    built = torch.version.cuda or torch.version.hip
    why = f"built for CUDA {built}, which its driver may be too old for" if built else "built without CUDA"
    return f"PyTorch {torch.__version__} does not see ({why})"


def keep_float32() -> None:
    """Let products of float32 matrices be of float32, as PyTorch does by itself, and not of TF32, which has 10 bits.

    Where weights are made or measured, bounds of rounding are counted upon. NVIDIA's containers turn TF32 on for all
    processes by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; PyTorch reads that once, as its first setting, which this replaces.
    """
    import torch

    torch.set_float32_matmul_precision("highest")


def fits_device(nbytes: int, device: str) -> bool:
    """Whether `nbytes` fit in a GPU's free memory; always on a CPU, whose memory is the budget's concern."""
    import torch

    if torch.device(device).type != "cuda":
        return True
    torch.cuda.empty_cache()  # eigh's workspace, otherwise still counted as taken
    free, total = torch.cuda.mem_get_info(device)
    index = torch.device(device).index  # None for the current one, which this call does not take from the word `cuda`
    own = torch.cuda.get_per_process_memory_fraction(index) * total - torch.cuda.memory_reserved(device)
    return nbytes <= DEVICE_SHARE * min(free, own)


_FULL = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate",
)
"""What CUDA and its libraries say, past PyTorch's allocator, when they find no memory: handles want some."""


def is_full(error: BaseException) -> bool:
    """Whether an error means that the GPU's memory, or this process's share of it, is full."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


@contextmanager
def full_gpu_is_a_fault(what: str, without: str) -> Iterator[None]:
    """Around work on one piece of many, called `what`; `without`: the option that does without a GPU.

    Raises: FullError where the GPU's memory is full."""
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        raise FullError(
            f"{what}: the GPU's memory is full; give it more of a GPU if there is more (--gpus-per-task), or {without}"
        ) from error
