"""Batches of the predictor's training rows, gathered straight out of the coefficients by index.

A row of a batch is [lower | upper | target], (3·d2,): one gather brings all three. On the device that computes that is
all there is to it. Coefficients in host memory or in a mapped file, with a GPU to feed, are gathered by a thread, some
batches ahead, into two pinned buffers in turn: while one is copied to the device, the other is filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

GROUP = 8
"""Batches in a pinned buffer: enough that handing it over costs nothing beside filling it (6 MB at d2 = 1,024)."""


class Rows:
    """The rows of the triples (m−1, m, m+1), m in `middles`, of coefficients (layers, r, d2)."""

    def __init__(self, coefficients: Tensor, middles: Sequence[int], size: int, device: torch.device) -> None:
        """size: rows of a batch. device: where batches are wanted."""
        self._rows = coefficients.flatten(0, 1)
        self._r = coefficients.shape[1]
        self._middles = torch.tensor(middles)
        self._size, self._device = size, device
        self.count = len(middles) * self._r

    def shuffled(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Every row once, in batches (rows, 3·d2), the last one smaller; the order is the generator's alone."""
        order = torch.randperm(self.count, generator=generator)
        middle = self._middles[order // self._r] * self._r + order % self._r
        index = middle.unsqueeze(1) + torch.tensor([-self._r, self._r, 0])  # lower, upper, target
        if self._rows.device.type == "cpu" and self._device.type == "cuda":
            return self._fed(index)
        return self._gathered(index.to(self._rows.device))

    def _gathered(self, index: Tensor) -> Iterator[Tensor]:
        for some in torch.split(index, self._size):
            yield self._rows.index_select(0, some.flatten()).view(len(some), -1)

    def _fed(self, index: Tensor) -> Iterator[Tensor]:
        groups = torch.split(index, GROUP * self._size)
        shape = (len(groups[0]) * 3, self._rows.shape[1])
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
                there = held.to(self._device, non_blocking=True).view(len(group), -1)
                copied[at % 2].record()
                if at + 1 < len(groups):
                    coming = gatherer.submit(gather, at + 1)
                yield from torch.split(there, self._size)
