"""Synthetic layers of one weight type, on disk as in a checkpoint: what the benchmarks of LESA work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lesa_ray.checkpoint.finite import assert_finite
from lesa_ray.checkpoint.header import read_entries
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.shards import OutTensor
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import TensorFileWriter
from lesa_ray.lesa.streams import Load


@dataclass(frozen=True)
class Weights:
    """One weight type: its layers, (d1, d2) bfloat16, are the tensors "0", "1" … of one safetensors file."""

    name: str
    folder: str
    layers: int
    d1: int
    d2: int

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def slots(self) -> list[tuple[int, int, int]]:
        """A new layer in each gap of the top half: layers 15 … 30 of 32 in the released notebook."""
        start = self.layers // 2 - 1
        return [(self.layers + at, i, i + 1) for at, i in enumerate(range(start, self.layers - 1))]

    def write(self, seed: int, device: str = "cpu") -> None:
        """Make the layers, one in memory at a time: a random walk W_i = 0.8·W_{i−1} + 0.6·noise, with the numbers of
        `device`'s generator."""
        generator = torch.Generator(device).manual_seed(seed)
        planned = tuple(OutTensor(str(i), "BF16", (self.d1, self.d2), None) for i in range(self.layers))
        with Storage(self.folder).create(self.file) as file:
            writer = TensorFileWriter(file, planned)
            weight = torch.randn(self.d1, self.d2, generator=generator, device=device).mul_(0.02)
            noise = torch.empty_like(weight)
            for i in range(self.layers):
                writer.write(str(i), weight.cpu())
                weight.mul_(0.8).add_(noise.normal_(generator=generator), alpha=0.6 * 0.02)
            writer.finish()

    def load(self) -> Load:
        """As the tool reads a base: one range of one file for each layer, nothing mapped, looked at for NaN."""
        storage = Storage(self.folder)
        entries = {entry.name: entry for entry in read_entries(storage, self.file)}
        checkpoint = Checkpoint(self.folder, storage, {}, {}, entries)

        def load(layer: int) -> torch.Tensor:
            weight = checkpoint.read(str(layer))
            assert_finite(weight, str(layer))
            return weight

        return load
