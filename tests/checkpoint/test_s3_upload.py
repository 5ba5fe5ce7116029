"""Files written to S3 in parts: the bytes are right, several parts are on their way, a failure leaves nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from email.message import Message

import pytest

from lesa_ray.checkpoint import s3_upload
from lesa_ray.checkpoint.storage import Storage
from tests.moody import Moody, hold_until

MIB = 2**20
PART = 5 * MIB


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "UPLOADED", PART)


def test_any_size_written_in_any_pieces(store: Moody, uploads_left: Callable[[], list[str]]) -> None:
    storage = Storage("s3://bucket/sizes")
    for size in (0, 1, PART - 1, PART, PART + 1, 4 * PART + 17):
        data = random.Random(size).randbytes(size)
        with storage.create("file") as file:
            for start in range(0, size, 1_700_003):
                assert file.write(data[start : start + 1_700_003]) == len(data[start : start + 1_700_003])
            assert file.tell() == size
        assert storage.read("file") == data
        with storage.create("at once") as file:
            file.write(data)
        assert storage.read("at once") == data
    assert uploads_left() == []


def test_four_parts_are_on_their_way_and_no_more(store: Moody) -> None:
    most = hold_until(store, 4, lambda request, headers: "partNumber=" in request)
    with Storage("s3://bucket/flight").create("file") as file:
        file.write(bytes(8 * PART))
    assert most() == 4


def test_a_part_that_is_refused_ends_the_upload(store: Moody, uploads_left: Callable[[], list[str]]) -> None:
    def refuse(request: str, headers: Message) -> tuple[int, bytes] | None:
        return (403, b"<Error><Code>AccessDenied</Code></Error>") if "partNumber=3" in request else None

    storage = Storage("s3://bucket/refused")
    storage.write("file", b"old")
    store.answers = refuse
    taken = 0

    def write() -> None:
        nonlocal taken
        with storage.create("file") as file:
            for _ in range(1000):
                taken += file.write(bytes(MIB))

    with pytest.raises(PermissionError):
        write()
    assert taken < 100 * MIB  # it did not go on for long
    assert storage.read("file") == b"old"
    assert uploads_left() == []


@pytest.mark.parametrize("mood", ["refuses", "cuts"])
def test_a_store_that_fails_now_and_then(
    mood: str, store: Moody, uploads_left: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(11 * PART + 1)
    storage = Storage("s3://bucket/moods")
    setattr(store, mood, lambda number: number % 5 == 0)
    with storage.create("file") as file:
        file.write(data)
    assert store.refused + store.cut >= 2
    setattr(store, mood, lambda number: False)
    assert storage.read("file") == data
    assert uploads_left() == []
