"""Plan the parts of a multipart upload, so that as few bytes as possible pass through this machine.

A file that is to lie in S3 is a row of pieces: some lie in S3 already and can be copied there by the server
(UploadPartCopy), the others must be uploaded. S3 takes at most 10,000 parts, of 5 MiB to 5 GiB each, the last may be
smaller, and copies ranges only of objects larger than 5 MiB
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html). So what is too short to be a part, a header before
a long run, say, borrows the missing bytes from the copied neighbour: at most 5 MiB a piece pass that would not have to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

SMALLEST_PART = 5 * 2**20
LARGEST_PART = 5 * 2**30
MOST_PARTS = 10_000
UPLOADED = 16 * 2**20
"""Bytes of an uploaded part, about: what each part in flight holds in memory, twice while it waits for the network."""
_COPIED = 128 * 2**20
"""Bytes of a copied part, about: the server answers well within a client's time-out, and several run side by side."""


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes from `offset` on of an object in S3 that has this ETag."""

    bucket: str
    key: str
    etag: str
    offset: int

    def after(self, nbytes: int) -> Source:
        """The place `nbytes` further on."""
        return replace(self, offset=self.offset + nbytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `nbytes` bytes of the file; where the server can copy them from, if it can."""

    nbytes: int
    source: Source | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, end) of the file: copied by the server from `source`, or uploaded where there is none."""

    start: int
    end: int
    source: Source | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def plan_parts(pieces: Sequence[Piece]) -> list[Part]:
    """Cut a file into parts that S3 accepts, in order.

    Long runs of copied bytes become parts of about 128 MiB, what is between them parts of up to 16 MiB; both grow
    where that would make more than 10,000.
    """
    merged = list(_merge(pieces))
    shortest, uploaded, copied = SMALLEST_PART + 1, UPLOADED, _COPIED
    while True:
        runs = _copied_runs(merged, shortest)
        parts = list(_cut(runs, sum(piece.nbytes for piece in merged), uploaded, copied))
        if len(parts) <= MOST_PARTS:
            return parts
        shortest, uploaded, copied = 2 * shortest, min(2 * uploaded, LARGEST_PART), min(2 * copied, LARGEST_PART)


def uploaded_ranges(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """The ranges [start, end) of the file that are uploaded, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for part in parts:
        if part.source is None:
            start = ranges.pop()[0] if ranges and ranges[-1][1] == part.start else part.start
            ranges.append((start, part.end))
    return ranges


def _merge(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Join pieces that are neighbours in their source too."""
    last: Piece | None = None
    for piece in pieces:
        if last and last.source and piece.source == last.source.after(last.nbytes):
            last = replace(last, nbytes=last.nbytes + piece.nbytes)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _copied_runs(pieces: Sequence[Piece], shortest: int) -> list[Part]:
    """The ranges to copy, none shorter than `shortest`, with nothing between them or at least a part's bytes.

    From left to right: what a gap lacks is taken from the run before it, which is there already, else from the one
    after it. A run that would become too short is uploaded; it has less than `shortest` and 5 MiB together.
    """
    runs: list[Part] = []
    position = 0
    for piece in pieces:
        start, end = position, position + piece.nbytes
        position = end
        if piece.source is None:
            continue
        gap = start - (runs[-1].end if runs else 0)
        lacking = max(SMALLEST_PART - gap, 0) if gap else 0
        from_before = min(lacking, runs[-1].nbytes - shortest) if runs else 0
        from_this = lacking - from_before
        if piece.nbytes - from_this < shortest:
            continue
        if from_before:
            runs[-1] = replace(runs[-1], end=runs[-1].end - from_before)
        runs.append(Part(start + from_this, end, piece.source.after(from_this)))
    return runs


def _cut(runs: list[Part], total: int, uploaded: int, copied: int) -> Iterator[Part]:
    position = 0
    for run in [*runs, Part(total, total)]:
        yield from _equal(Part(position, run.start), uploaded)
        yield from _equal(run, copied)
        position = run.end


def _equal(stretch: Part, size: int) -> Iterator[Part]:
    """Cut into equal parts of at most `size` bytes, so that no short one remains."""
    count = -(-stretch.nbytes // size)
    edges = [stretch.start + stretch.nbytes * i // count for i in range(count + 1)] if count else []
    for start, end in pairwise(edges):
        yield Part(start, end, stretch.source and stretch.source.after(start - stretch.start))
