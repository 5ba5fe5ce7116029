"""Where the coefficients lie: the only large thing that a unit of work keeps.

On the GPU if they fit, else in host memory if they fit in the unit's budget, else in a file in node-local scratch that
is mapped into memory and unlinked at once, so that the disk space is free again when the process ends, however it
ends. Where they lie decides the speed of a gather, not a single bit of the result.
"""

from __future__ import annotations

import math
import os
import tempfile

import torch
from torch import Tensor

from lesa_ray.errors import MachineError
from lesa_ray.lesa.cost import DEVICE_SHARE


class Room:
    """A place for a tensor that is taken when it is known what else has to fit beside it."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        scratch_dir: str | None,
        memory_budget: int | None,
    ) -> None:
        """shape: (checkpoints, layers, rows, d2). Without a `scratch_dir` or a budget host memory always does."""
        self._shape, self._dtype, self._device = shape, dtype, device
        self._scratch_dir, self._budget = scratch_dir, memory_budget
        self._tensor: Tensor | None = None
        self.nbytes = math.prod(shape) * dtype.itemsize

    @property
    def tensor(self) -> Tensor:
        """Uninitialised when taken."""
        assert self._tensor is not None, "take() comes first"
        return self._tensor

    def holds(self, nbytes: int) -> bool:
        """Whether one layer of `nbytes` fits in the place of its coefficients."""
        return nbytes <= math.prod(self._shape[2:]) * self._dtype.itemsize

    def layer(self, checkpoint: int, layer: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A view (shape, dtype) of the place of one layer's coefficients."""
        place = self.tensor[checkpoint, layer].flatten().view(torch.uint8)
        return place[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def take(self, beside: int, *, or_file: bool) -> bool:
        """Take the place, unless it was taken; False if there is none.

        beside: bytes on the device (or in memory, without a GPU) that others are yet to take. or_file: whether the file
        will do; it is worse than what may be free when the others are gone.

        Raises: MachineError if the file cannot be made or the disk has no room for it.
        """
        if self._tensor is not None:
            return True
        on_cpu = torch.device(self._device).type == "cpu"
        if not on_cpu and fits_device(self.nbytes + beside, self._device):
            self._tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            return True
        needed = self.nbytes + (beside if on_cpu else 0)
        if self._scratch_dir is None or self._budget is None or needed <= self._budget:
            self._tensor = torch.empty(self._shape, dtype=self._dtype)
            return True
        if or_file:
            self._tensor = self._mapped(self._scratch_dir)
        return or_file

    def _mapped(self, scratch_dir: str) -> Tensor:
        try:
            handle, path = tempfile.mkstemp(prefix="coefficients-", dir=scratch_dir)
            try:
                # Blocks are reserved now: a full disk is an error here and no bus error in the middle of the work.
                os.posix_fallocate(handle, 0, self.nbytes)
                count = math.prod(self._shape)
                return torch.from_file(path, shared=True, size=count, dtype=self._dtype).view(self._shape)
            finally:
                os.close(handle)
                os.unlink(path)
        except OSError as error:
            what = f"cannot reserve {self.nbytes / 1e9:.1f} GB of scratch space"
            raise MachineError(f"{scratch_dir}: {what}: {error.strerror}") from error


def fits_device(nbytes: int, device: str) -> bool:
    """Whether `nbytes` fit in a GPU's free memory; always on a CPU, whose memory is the budget's concern."""
    if torch.device(device).type != "cuda":
        return True
    torch.cuda.empty_cache()  # eigh's workspace, otherwise still counted as taken
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= DEVICE_SHARE * free
