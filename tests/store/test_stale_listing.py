"""A store whose listings lag behind: what is finished is found by its key, and no record is of half a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from email.message import Message

import pytest
from s3fs import S3FileSystem

from lesa_ray import MachineError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.fleet.state import look
from lesa_ray.store import record as record_module
from lesa_ray.store.catalog import Store
from lesa_ray.store.identity import Identity
from lesa_ray.store.record import compare_files, describe_files, make_record
from tests.moody import Moody

NOTHING = (
    b"<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
    b"<Name>bucket</Name><Prefix></Prefix><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys>"
    b"<IsTruncated>false</IsTruncated></ListBucketResult>"
)
STAGE = Identity("expand", {"base": "b"}, {"method": "solar"}, "0.1.0")


class Lagging:
    """Answers the next `stale` requests for a listing as if nothing had been written yet."""

    def __init__(self) -> None:
        self.stale = 0

    def __call__(self, request: str, headers: Message) -> tuple[int, bytes] | None:
        if "list-type=2" not in request or self.stale <= 0:
            return None
        self.stale -= 1
        return 200, NOTHING


@pytest.fixture
def lagging(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lagging]:
    proxy, lag = Moody(os.environ["AWS_ENDPOINT_URL"]), Lagging()
    proxy.answers = lag
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(record_module, "_LISTING_PAUSES", (0.01,) * 4)
    S3FileSystem.clear_instance_cache()
    yield lag
    S3FileSystem.clear_instance_cache()
    proxy.stop()


def filled(storage: Storage) -> None:
    storage.write("model.safetensors", b"weights")
    storage.write("tokenizer.json", b"words")
    storage.write("config.json", b"{}")


@pytest.mark.timeout(180)
def test_a_record_is_of_the_whole_folder(s3: str, lagging: Lagging) -> None:
    storage = Storage(f"{s3}/lagging/whole")
    filled(storage)
    lagging.stale = 2
    assert set(describe_files(storage)) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert lagging.stale == 0
    lagging.stale = 1000
    with pytest.raises(MachineError, match="listing lacks files that are there"):
        describe_files(storage)


@pytest.mark.timeout(180)
def test_what_is_finished_is_found_and_verified(s3: str, lagging: Lagging) -> None:
    store = Store(f"{s3}/lagging/store")
    place = STAGE.place("x")
    filled(store.folder(place))
    files = describe_files(store.folder(place))
    record = make_record(STAGE, "x", given={}, started="2026-01-01", seconds=1.0, metrics={}, files=files)
    store.finish(place, record)
    lagging.stale = 1000
    assert look(store, STAGE, "x").state == "complete"
    assert compare_files(store.folder(place), record) == []
