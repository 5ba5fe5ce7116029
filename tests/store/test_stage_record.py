"""The record of a finished stage, and what `verify` finds wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lesa_ray import MachineError, UserError
from lesa_ray.checkpoint.side_files import side_files
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.store import record as record_module
from lesa_ray.store.identity import Identity
from lesa_ray.store.record import (
    RECORD_FILE,
    Record,
    compare_files,
    describe_files,
    make_record,
    read_record,
    write_record,
)

STAGE = Identity("expand", {"base": "b"}, {"method": "solar"}, "0.1.0")
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 90_000,
    "training/checkpoints/a/b.bin": b"",
    "training/checkpoints/a/c.bin": b"weights",
    "training/.note": b"hidden",
    "training/half.tmp": b"a name like another",
}
LEFT = "training/.b.bin.0123abcd.tmp"
"""What a killed write leaves."""


def filled(url: str) -> tuple[Storage, Record]:
    storage = Storage(url)
    for name, data in FILES.items():
        storage.write(name, data)
    storage.write(LEFT, b"half")
    record = make_record(
        STAGE, "x", given={"out": url}, started="2026-01-01", seconds=0.25, metrics={"loss": float("inf")},
        files=describe_files(storage),
    )  # fmt: skip
    write_record(storage, record)
    return storage, record


@pytest.mark.timeout(180)
def test_every_file_is_in_the_record_and_every_change_is_found(place: str) -> None:
    storage, record = filled(place)
    assert record["files"] == {
        name: {
            "bytes": len(data),
            "sha256": None if "checkpoints" in name else hashlib.sha256(data).hexdigest(),
        }
        for name, data in FILES.items()
    }
    assert record["bytes"] == sum(map(len, FILES.values()))
    again = read_record(storage)
    assert again == record
    assert (again["metrics"], again["given"], again["seconds"]) == ({"loss": None}, {"out": place}, 0.25)
    assert compare_files(storage, record) == []
    flipped = bytearray(FILES["model.safetensors"])
    flipped[20_000_000] ^= 1
    storage.write("model.safetensors", bytes(flipped))
    storage.remove("config.json")
    storage.write("training/more.txt", b"x")
    storage.write("training/checkpoints/a/b.bin", b"xx")
    storage.write("training/checkpoints/a/c.bin", b"of size")
    assert compare_files(storage, record) == [
        "config.json: is missing",
        "model.safetensors: has other content",
        "training/checkpoints/a/b.bin: has 2 bytes, not 0",
        "training/more.txt: is not in the record",
    ]


@pytest.mark.parametrize("last", ["config.json", "words.bin"])
def test_a_listing_that_lacks_some_files_yet_is_asked_for_again(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    for name in ("a.bin", last):
        storage.write(name, b"1")
    listings = iter([{}, {"a.bin": 1}, {"a.bin": 1, last: 1}] if last == "config.json" else [{}, {"a.bin": 1, last: 1}])
    monkeypatch.setattr(record_module, "walk", lambda _: next(listings))
    monkeypatch.setattr(record_module, "_LISTING_PAUSES", (0.0,) * 4)
    assert set(describe_files(storage)) == {"a.bin", last}


def test_the_code_is_known_by_the_names_and_bytes_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "store" / "record.py"))

    def digest(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / "store" / f"{name}.py").write_text(text)
        found: str = record_module.sources_digest.__wrapped__()
        for name in files:
            (tmp_path / "store" / f"{name}.py").unlink()
        return found

    first = digest(a="1", b="2")
    assert digest(a="1", b="2") == first
    assert len({first, digest(a="1", b="3"), digest(a="2", b="1"), digest(a="1", c="2"), digest(a="1")}) == 5


def test_a_finished_stage_is_not_finished_again(tmp_path: object) -> None:
    storage, record = filled(str(tmp_path))
    with pytest.raises(MachineError, match="never written again"):
        write_record(storage, record)


def test_a_record_does_not_go_along_with_what_it_is_of() -> None:
    assert side_files(["tokenizer.json", RECORD_FILE]) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is not a record of format 1"),
        ('{"format": 2}', "is not a record of format 1"),
    ],
)
def test_a_record_that_is_none(content: str, says: str, tmp_path: object) -> None:
    storage = Storage(str(tmp_path))
    assert read_record(storage) is None
    storage.write(RECORD_FILE, content.encode())
    with pytest.raises(UserError, match=says):
        read_record(storage)


def test_a_record_that_was_edited(tmp_path: object) -> None:
    storage, record = filled(str(tmp_path))
    record["identity"]["settings"]["method"] = "lesa"
    storage.write(RECORD_FILE, json.dumps(record).encode())
    with pytest.raises(UserError, match="changed by hand"):
        read_record(storage)
