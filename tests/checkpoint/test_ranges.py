"""Long ranges of a remote file: read side by side they are the same bytes, in order, and no more than asked for."""

from __future__ import annotations

import random
from email.message import Message

import pytest
import torch
from safetensors.torch import save

from lesa_ray import UserError
from lesa_ray.checkpoint import ranges
from lesa_ray.checkpoint.ranges import read_ahead, read_into
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from tests.moody import Moody, hold_until

PIECE = 64 * 1024
DATA = random.Random(0).randbytes(20 * PIECE + 5)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE", PIECE)


@pytest.fixture
def storage(store: Moody) -> Storage:
    place = Storage("s3://bucket/ranges")
    place.write("file", DATA)
    return place


def test_the_same_bytes(storage: Storage) -> None:
    for start, size in ((0, 0), (7, 1), (3, PIECE), (3, PIECE + 1), (0, len(DATA)), (len(DATA), 0)):
        buffer = bytearray(size)
        read_into(storage, "file", start, memoryview(buffer))
        assert buffer == DATA[start : start + size]
        assert b"".join(read_ahead(storage, "file", start, start + size)) == DATA[start : start + size]


def test_a_file_that_ends_early(storage: Storage) -> None:
    end = len(DATA)
    for start, size in ((0, end + 1), (end - 9, 10), (end - 9, end), (end + 9, 10), (end + 9, end)):
        with pytest.raises(UserError, match="file: ends before its header says"):
            read_into(storage, "file", start, memoryview(bytearray(size)))
        with pytest.raises(UserError, match="file: ends before its header says"):
            list(read_ahead(storage, "file", start, start + size))


def is_range(request: str, headers: Message) -> bool:
    return request.startswith("GET") and "range" in headers


def test_eight_ranges_of_a_tensor_are_on_their_way(storage: Storage, store: Moody) -> None:
    most = hold_until(store, 8, is_range)
    buffer = bytearray(16 * PIECE)
    read_into(storage, "file", 1, memoryview(buffer))
    assert buffer == DATA[1 : 1 + len(buffer)]
    assert most() == 8


def test_four_ranges_are_read_ahead(storage: Storage, store: Moody) -> None:
    most = hold_until(store, 4, is_range)
    pieces = read_ahead(storage, "file", 0, 8 * PIECE)
    assert next(pieces) == DATA[:PIECE]
    pieces.close()  # type: ignore[attr-defined]
    assert most() == 4
    assert sum("ranges/file" in request for request, _, _ in store.passed) <= 1 + 4  # the writing, and four readings


def test_a_tensor_from_a_store_that_cuts_answers_off(store: Moody) -> None:
    weight = torch.randn(600, 700)
    storage = Storage("s3://bucket/cut")
    storage.write("model.safetensors", save({"w": weight}))
    storage.write("config.json", b"{}")
    checkpoint = open_checkpoint(storage.url)
    store.cuts = lambda number: number % 5 == 0
    assert torch.equal(checkpoint.read("w"), weight)
    assert store.cut >= 3
