"""Parts of an upload: whatever the pieces, S3 accepts them, each byte is there once, and few of them are uploaded."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from lesa_ray.checkpoint.part_plan import MOST_PARTS, SMALLEST_PART, Part, Piece, Source, plan_parts, uploaded_ranges

MIB = 2**20
GIB = 2**30


def source(offset: int, key: str = "a") -> Source:
    return Source("bucket", key, '"tag"', offset)


def check(pieces: list[Piece], parts: list[Part]) -> None:
    """S3's rules, and that each part's source is what the pieces say."""
    assert len(parts) <= MOST_PARTS
    assert all(part.nbytes >= SMALLEST_PART for part in parts[:-1])
    assert all(0 < part.nbytes <= 5 * GIB for part in parts)
    assert all(part.nbytes > SMALLEST_PART for part in parts if part.source)
    assert [part.start for part in parts] == [0, *(part.end for part in parts)][:-1]
    assert (parts[-1].end if parts else 0) == sum(piece.nbytes for piece in pieces)
    starts = [sum(piece.nbytes for piece in pieces[:i]) for i in range(len(pieces))]
    for part in parts:
        for start, piece in zip(starts, pieces, strict=True):
            if part.source and piece.nbytes and start < part.end and part.start < start + piece.nbytes:
                assert piece.source is not None
                assert part.source.after(start - part.start) == piece.source


def uploaded(parts: list[Part]) -> int:
    return sum(part.nbytes for part in parts if part.source is None)


def test_a_header_borrows_from_the_run_behind_it() -> None:
    pieces = [Piece(1000), Piece(300 * MIB, source(77))]
    parts = plan_parts(pieces)
    check(pieces, parts)
    assert parts[0] == Part(0, 5 * MIB)
    assert parts[1].source == source(77 + 5 * MIB - 1000)
    assert len(parts) == 4  # 295 MiB in copies of at most 128
    assert uploaded_ranges(parts) == [(0, 5 * MIB)]


def test_a_gap_borrows_from_the_run_before_it() -> None:
    pieces = [Piece(100 * MIB, source(0)), Piece(7), Piece(100 * MIB, source(0, "b"))]
    parts = plan_parts(pieces)
    check(pieces, parts)
    assert uploaded_ranges(parts) == [(95 * MIB + 7, 100 * MIB + 7)]


def test_runs_that_meet_need_nothing_between_them() -> None:
    pieces = [Piece(10 * MIB, source(0)), Piece(10 * MIB, source(0, "b"))]
    assert [part.source for part in plan_parts(pieces)] == [source(0), source(0, "b")]


def test_neighbours_in_their_source_are_one_run() -> None:
    pieces = [Piece(4 * MIB, source(0)), Piece(100, source(4 * MIB)), Piece(4 * MIB, source(4 * MIB + 100))]
    assert plan_parts(pieces) == [Part(0, 8 * MIB + 100, source(0))]


def test_what_is_short_is_uploaded() -> None:
    """Of objects of up to 5 MiB S3 copies no ranges."""
    for pieces in ([Piece(5 * MIB, source(0))], [Piece(9), Piece(9 * MIB, source(0))], [Piece(3), Piece(4)]):
        assert plan_parts(pieces) == [Part(0, sum(piece.nbytes for piece in pieces))]
    assert plan_parts([Piece(0)]) == []


def test_the_last_part_may_be_short() -> None:
    pieces = [Piece(10 * MIB, source(0)), Piece(3)]
    assert plan_parts(pieces) == [Part(0, 10 * MIB, source(0)), Part(10 * MIB, 10 * MIB + 3)]


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(700 * GIB), Piece(9)],
        [Piece(4000 * GIB, source(0))],
        [piece for i in range(9000) for piece in (Piece(8), Piece(16 * MIB, source(20 * MIB * i)))],
    ],
    ids=["uploaded", "copied", "many short runs"],
)
def test_at_most_ten_thousand_parts(pieces: list[Piece]) -> None:
    parts = plan_parts(pieces)
    assert 1 < len(parts) <= MOST_PARTS
    assert all(SMALLEST_PART <= part.nbytes <= 5 * GIB for part in parts[:-1])
    assert parts[-1].end == sum(piece.nbytes for piece in pieces)


@pytest.mark.parametrize("seed", range(40))
def test_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    pieces = []
    for _ in range(rng.randrange(1, 40)):
        size = rng.choice([0, 1, 1000, MIB, 5 * MIB, 6 * MIB, 9 * MIB, 40 * MIB, 300 * MIB]) + rng.randrange(3)
        pieces.append(Piece(size, source(rng.randrange(GIB), rng.choice("ab")) if rng.random() < 0.6 else None))
    parts = plan_parts(pieces)
    check(pieces, parts)
    long = [piece.nbytes for piece in pieces if piece.source and piece.nbytes > 10 * MIB]
    must = sum(piece.nbytes for piece in pieces) - sum(long)
    assert uploaded(parts) <= must + 5 * MIB * (len(long) + 1)
    ranges = uploaded_ranges(parts)
    assert sum(end - start for start, end in ranges) == uploaded(parts)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
