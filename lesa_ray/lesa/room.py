"""Where the coefficients lie: the only large thing that a unit of work keeps.

On the GPU if they fit, else in host memory if they fit in the unit's budget, else in a file in node-local scratch that
is mapped into memory and unlinked at once, so that the disk space is free again when the process ends, however it
ends. Where they lie decides the speed of a gather, not a single bit of the result. Those of fits that are trained side
by side lie in one tensor: one gather reaches the rows of all.
"""

from __future__ import annotations

import math
import os
import tempfile

import torch
from torch import Tensor

from lesa_ray.errors import MachineError
from lesa_ray.gpu import fits_device
from lesa_ray.lesa.needs import Place, choose_place
from lesa_ray.sizes import size


class Rooms:
    """The places of `count` fits of one shape, taken together when it is known what else has to fit beside them."""

    def __init__(self, count: int, device: str, scratch_dir: str | None, memory_budget: int | None) -> None:
        """Without a `scratch_dir` or a budget host memory always does."""
        self._count, self._device = count, device
        self._scratch_dir, self._budget = scratch_dir, memory_budget
        self._given = 0
        self._place: Tensor | None = None
        self._filed = False

    def next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Room:
        """The place of the next fit; shape: (checkpoints, layers, rows, d2), the same for all."""
        self._given += 1
        assert self._given <= self._count, "a room for each fit"
        return Room(self, self._given - 1, shape, dtype)

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, beside: int, *, taken: int = 0, or_file: bool
    ) -> Tensor | None:
        """All places, (count, *shape), uninitialised when taken; as `Room.take`, None if there is none."""
        whole = (self._count, *shape)
        if self._place is None:
            self._place = self._in_memory(whole, dtype, beside, taken)
        if self._place is None and or_file:
            assert self._scratch_dir is not None, "host memory does without one"
            self._place, self._filed = _mapped(whole, dtype, self._scratch_dir), True
        assert self._place is None or (self._place.shape == whole and self._place.dtype == dtype), "fits of one shape"
        return self._place if or_file or not self._filed else None

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype, beside: int) -> None:
        """Take the file if `take` will find no other place."""
        whole = (self._count, *shape)
        if self._place is None and self._where(whole, dtype, beside, 0) == "scratch":
            self.take(shape, dtype, beside, or_file=True)

    def _in_memory(self, shape: tuple[int, ...], dtype: torch.dtype, beside: int, taken: int) -> Tensor | None:
        where = self._where(shape, dtype, beside, taken)
        if where == "scratch":
            return None
        return torch.empty(shape, dtype=dtype, device=self._device if where == "device" else "cpu")

    def _where(self, shape: tuple[int, ...], dtype: torch.dtype, beside: int, taken: int) -> Place:
        on_cpu = torch.device(self._device).type == "cpu"
        budget = None if self._scratch_dir is None else self._budget
        fits_gpu = None if on_cpu else (lambda nbytes: fits_device(nbytes - taken, self._device))
        return choose_place(math.prod(shape) * dtype.itemsize, beside, budget, fits_gpu)


class Room:
    """A place for the coefficients of one fit."""

    def __init__(self, rooms: Rooms, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._rooms, self._at, self._shape, self._dtype = rooms, at, shape, dtype
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """(checkpoints, layers, rows, d2), uninitialised when taken."""
        assert self._tensor is not None, "take() comes first"
        return self._tensor

    def holds(self, nbytes: int) -> bool:
        """Whether one layer of `nbytes` fits in the place of its coefficients."""
        return nbytes <= math.prod(self._shape[2:]) * self._dtype.itemsize

    def layer(self, checkpoint: int, layer: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A view (shape, dtype) of the place of one layer's coefficients."""
        place = self.tensor[checkpoint, layer].flatten().view(torch.uint8)
        return place[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def reserve(self, beside: int) -> None:
        """Before long work, after which the place is taken with `beside`: make the file if there will be no other
        place, so that a disk without room for it is told of now. Raises: MachineError, as `take`."""
        self._rooms.reserve(self._shape, self._dtype, beside)

    def take(self, beside: int, *, taken: int = 0, or_file: bool) -> bool:
        """Take the place, unless it was taken; False if there is none.

        beside: bytes that are needed on the device (or in memory, without a GPU) as long as the place is; taken: of
        them those that lie on the device already. or_file: whether the file will do; it is worse than what may be free
        when others are gone.

        Raises: MachineError if the file cannot be made or the disk has no room for it.
        """
        if self._tensor is None:
            places = self._rooms.take(self._shape, self._dtype, beside, taken=taken, or_file=or_file)
            self._tensor = None if places is None else places[self._at]
        return self._tensor is not None


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, scratch_dir: str) -> Tensor:
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    try:
        handle, path = tempfile.mkstemp(prefix="coefficients-", dir=scratch_dir)
        try:
            # Blocks are reserved now: a full disk is an error here and no bus error in the middle of the work.
            os.posix_fallocate(handle, 0, nbytes)
            return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        what = f"cannot reserve {size(nbytes)} of scratch space: {error.strerror}"
        raise MachineError(f"{scratch_dir}: {what}; set LESA_RAY_SCRATCH to a folder on a disk with room") from error
