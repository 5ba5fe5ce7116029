"""How the tensors of a checkpoint lie in its files, planned to the byte before there is anything to write."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from lesa_ray.checkpoint.header import ELEMENT_BYTES
from lesa_ray.errors import UserError
from lesa_ray.sizes import parse_size

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` bytes at `offset` of `file` in the storage at `url`, elements of type `dtype`."""

    url: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    name: str
    """The tensor's name there, for messages."""
    check: bool = False
    """Whether to look for NaN and Inf on the way (old tensors; those a unit made were looked at when made)."""
    scale: float = 1.0
    """What the values are multiplied by on the way."""


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of the result and where its bytes come from; no source means zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Span | None
    parts: tuple[OutTensor, ...] = ()
    """Where its bytes come from several places: what lies in it, one after the other, each with its source."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES.get(self.dtype, 1)

    @property
    def converted(self) -> bool:
        """Whether its values change on the way, so that no bytes can be copied."""
        return self.source is not None and (self.source.dtype != self.dtype or self.source.scale != 1)


@dataclass(frozen=True)
class Shard:
    """One file of the result."""

    file: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(header_bytes(self.tensors)) + sum(tensor.nbytes for tensor in self.tensors)


def shard_limit(text: str) -> int:
    """Bytes of `--shard-size`. Raises: UserError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--shard-size {text}: {error}") from None


def plan_shards(groups: list[list[OutTensor]], limit: int) -> list[Shard]:
    """Lay tensors into files of at most `limit` bytes; each group begins a file of its own.

    A tensor larger than the limit has a file to itself.
    """
    files: list[list[OutTensor]] = []
    for group in groups:
        room = -1
        for tensor in group:
            if tensor.nbytes > room:
                files.append([])
                room = limit
            files[-1].append(tensor)
            room -= tensor.nbytes
    if len(files) == 1:
        return [Shard(SINGLE_FILE, tuple(files[0]))]
    total = len(files)
    return [Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(file)) for i, file in enumerate(files, start=1)]


def index_bytes(shards: list[Shard]) -> bytes:
    """The JSON index that transformers reads (`model.safetensors.index.json`)."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def header_bytes(tensors: tuple[OutTensor, ...]) -> bytes:
    """Length and JSON header of a safetensors file with these tensors, padded so that data begin on 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
