"""What flows into the core and where it is kept: checked layers in, one coefficient tensor, one seed per purpose.

Layers arrive one at a time from a callable, so that a unit of work never holds all of them. The coefficients
are the only large thing it keeps; above `memory_budget` bytes they live in a file that is mapped into memory
and unlinked at once, so that the disk space is free again when the process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lesa_ray.errors import MachineError, UserError

Load = Callable[[int], Tensor]
"""Layer number → its weight (d1, d2), any float dtype, on the CPU. Called several times per layer."""


def seed_for(seed: int, *purpose: object) -> int:
    """A seed of its own for each use of randomness, so that one use never shifts the numbers of another."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose; the global random state is neither read nor changed."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def square_norm(weight: Tensor) -> float:
    """‖W‖²_F in float64."""
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2


class Layers:
    """The layers of one checkpoint, checked and streamed: each iteration loads them again; only layer 0 is kept.

    Raises, while it is read: UserError for a layer that is not a float matrix of the same shape as the others
    or holds NaN or Inf. The line names the layer; who knows the tensor's name wraps `load`.
    """

    def __init__(self, load: Load, count: int, shape: tuple[int, int] | None = None) -> None:
        self._load, self._count = load, count
        first = load(0)
        if first.ndim != 2 or not first.is_floating_point():
            raise UserError(f"layer 0: expected a float matrix, found {first.dtype} of shape {tuple(first.shape)}")
        self.shape: tuple[int, int] = shape or (first.shape[0], first.shape[1])
        self.dtype = first.dtype
        self._first = self._checked(0, first)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        yield self._first
        for i in range(1, self._count):
            yield self._checked(i, self._load(i))

    def _checked(self, layer: int, weight: Tensor) -> Tensor:
        if tuple(weight.shape) != self.shape or weight.dtype != self.dtype:
            found = f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise UserError(f"layer {layer}: found {found}, expected {self.dtype} of shape {self.shape}")
        # The sum of squares is finite if and only if every entry is: one pass, no mask.
        if not math.isfinite(square_norm(weight)):
            raise UserError(f"layer {layer}: holds NaN or Inf; the weights must be finite")
        return weight


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Coefficients are float32, or float64 where the weights are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate(shape: tuple[int, ...], dtype: torch.dtype, scratch_dir: str | None, memory_budget: int | None) -> Tensor:
    """An uninitialised CPU tensor: in memory up to `memory_budget` bytes, above it in a vanishing file.

    Without a `scratch_dir` or without a budget it is always in memory.

    Raises: MachineError if the file cannot be made or the disk has no room for it.
    """
    count = math.prod(shape)
    if scratch_dir is None or memory_budget is None or count * dtype.itemsize <= memory_budget:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    try:
        handle, path = tempfile.mkstemp(prefix="coefficients-", dir=scratch_dir)
        try:
            # Blocks are reserved now, so that a full disk is an error here and no bus error in the middle of the work.
            os.posix_fallocate(handle, 0, size)
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        what = f"cannot reserve {size / 1e9:.1f} GB of scratch space"
        raise MachineError(f"{scratch_dir}: {what}: {error.strerror}") from error
