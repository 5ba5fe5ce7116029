"""A little of each tensor, for telling weights apart without reading them whole.

Weights that were trained on differ in every sample. What can differ alone is small – norms, biases, the rows of a few
tokens added at the end of an embedding – so small tensors are taken whole, and of large ones the ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lesa_ray.checkpoint.header import TensorEntry
from lesa_ray.checkpoint.ranges import read_full
from lesa_ray.checkpoint.storage import Storage

_WHOLE = 64 * 2**10
"""Bytes: a norm of 32,768 elements of two bytes."""
_SAMPLE = 4096
_EVERY = 32 * 2**20
"""Bytes for a sample between the ends."""
_MOST = 16


def samples(storage: Storage, file: str, entries: Iterable[TensorEntry]) -> Iterator[bytes]:
    """What stands for these tensors of a file, in the order of their bytes.

    At 140 GB some 5,000 reads; a mixture's experts take one each, where they lie side by side."""
    wanted = sample_ranges(entries)
    if not storage.is_local:
        for start, end in wanted:
            yield storage.read(file, start, end)
        return
    with open(storage.path(file), "rb") as opened:
        for start, end in wanted:
            sample = bytearray(end - start)
            read_full(opened.fileno(), memoryview(sample), start)
            yield bytes(sample)


def sample_ranges(entries: Iterable[TensorEntry]) -> list[tuple[int, int]]:
    """Bytes [start, end) of their file that stand for tensors; what touches is one range, up to 1 MiB."""
    ranges: list[tuple[int, int]] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        for start, end in _of_one(entry.nbytes):
            start, end = entry.offset + start, entry.offset + end
            if ranges and ranges[-1][1] == start and end - ranges[-1][0] <= 2**20:
                ranges[-1] = (ranges[-1][0], end)
            elif end > start:
                ranges.append((start, end))
    return ranges


def _of_one(nbytes: int) -> list[tuple[int, int]]:
    if nbytes <= _WHOLE:
        return [(0, nbytes)]
    count = min(2 + nbytes // _EVERY, _MOST)
    starts = [(nbytes - _SAMPLE) * sample // (count - 1) for sample in range(count)]
    return [(start, start + _SAMPLE) for start in starts]
