"""Batches of the predictors' training rows, gathered straight out of the coefficients by index.

A row of a batch is [lower | upper | target], (3·d2,): one gather brings all three, and for predictors that are trained
side by side the rows of each, since their coefficients lie in one tensor. On the device that computes that is all there
is to it. Coefficients in host memory or in a mapped file, with a GPU to feed, are gathered by a thread, some batches
ahead, into two pinned buffers in turn: while one is copied to the device, the other is filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

GROUP = 8
"""Batches of a predictor in a pinned buffer: enough that handing it over costs nothing beside filling it (6 MB at
d2 = 1,024). Where several predictors are trained together, a batch of each makes it large enough sooner."""


class Rows:
    """The rows of the triples (m−1, m, m+1), m in the `middles` of each of n fits, of their coefficients."""

    def __init__(
        self, coefficients: Sequence[Tensor], middles: Sequence[Sequence[int]], size: int, device: torch.device
    ) -> None:
        """coefficients: (layers, r, d2) of each fit, contiguous and, if of several, in one storage (`Rooms`).
        middles: of each as many. size: rows of a batch, of each. device: where batches are wanted."""
        first = coefficients[0]
        self._fits, (_, self._r, d2) = len(coefficients), first.shape
        self.count = len(middles[0]) * self._r
        """Rows of each."""
        storage = first.untyped_storage()
        assert all(c.shape[1:] == first.shape[1:] and c.is_contiguous() for c in coefficients), "fits of one shape"
        assert all(c.untyped_storage().data_ptr() == storage.data_ptr() for c in coefficients), "in one storage"
        self._rows = first.as_strided((storage.nbytes() // first.element_size() // d2, d2), (d2, 1), 0)
        self._starts = [int(c.storage_offset()) // d2 for c in coefficients]
        self._middles = [torch.tensor(some) for some in middles]
        self._size, self._device = size, device

    def shuffled(self, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
        """Every row once, in batches (rows, n, 3·d2), the last one smaller; each fit's order is its generator's."""
        each = zip(self._starts, self._middles, generators, strict=True)
        index = torch.stack([self._order(start, middles, generator) for start, middles, generator in each], dim=1)
        if self._rows.device.type == "cpu" and self._device.type == "cuda":
            return self._fed(index)
        return self._gathered(index.to(self._rows.device))

    def _order(self, start: int, middles: Tensor, generator: torch.Generator) -> Tensor:
        """Which rows of lower, upper and target make each row of one fit, in a new order: (count, 3)."""
        order = torch.randperm(self.count, generator=generator)
        middle = start + middles[order // self._r] * self._r + order % self._r
        return middle.unsqueeze(1) + torch.tensor([-self._r, self._r, 0])

    def _gathered(self, index: Tensor) -> Iterator[Tensor]:
        for some in torch.split(index, self._size):
            yield self._rows.index_select(0, some.flatten()).view(len(some), self._fits, -1)

    def _fed(self, index: Tensor) -> Iterator[Tensor]:
        groups = torch.split(index, max(GROUP // self._fits, 1) * self._size)
        shape = (groups[0].numel(), self._rows.shape[1])
        buffers = [torch.empty(shape, dtype=self._rows.dtype, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]

        def gather(at: int) -> Tensor:
            copied[at % 2].synchronize()  # what the buffer held before has left it
            chosen = groups[at].flatten()
            return torch.index_select(self._rows, 0, chosen, out=buffers[at % 2][: len(chosen)])

        with ThreadPoolExecutor(1, "batches") as gatherer:
            coming = gatherer.submit(gather, 0)
            for at, group in enumerate(groups):
                held = coming.result()
                there = held.to(self._device, non_blocking=True).view(len(group), self._fits, -1)
                copied[at % 2].record()
                if at + 1 < len(groups):
                    coming = gatherer.submit(gather, at + 1)
                yield from torch.split(there, self._size)
