"""What others may see of a place, what tells it from others, and which places that others name are opened."""

from __future__ import annotations

import pickle

import pytest

from lesa_ray.config import ExpandConfig
from lesa_ray.errors import KeptError, MachineError, NotWritten, UserError
from lesa_ray.faults import explain
from lesa_ray.places import is_of_a_store, named, shown, unsigned
from lesa_ray.training.sources import Source

SECRET = "http://bob:hunter2@host:8000/a.jsonl?X-Amz-Date=1&X-Amz-Signature=SECRETSIG"


@pytest.mark.parametrize(
    ("place", "seen", "known"),
    [
        (SECRET, "http://host:8000/a.jsonl", "http://host:8000/a.jsonl"),
        ("https://h/a?sv=1&se=2&sig=x%3D", "https://h/a", "https://h/a"),
        ("https://h/a?part=2&token=b:c", "https://h/a", "https://h/a?part=2"),
        ("http://bob:p@ss@h/a", "http://h/a", "http://h/a"),
        ("simplecache::https://bob:b@h/a?token='b", "simplecache::https://h/a", "simplecache::https://h/a"),
        ("sftp://bob:b@h/a", "sftp://bob@h/a", "sftp://bob@h/a"),
        ("sftp://bob@h/a", "sftp://bob@h/a", "sftp://bob@h/a"),
        ("https://token@h/a", "https://h/a", "https://h/a"),
        ("http://h/a?keyword=x&st=1", "http://h/a", "http://h/a?keyword=x&st=1"),
        *(
            (same, same, same)
            for same in (
                *("data/part-?.jsonl", "/data/a@b.txt", "somebody/texts@main", "s3://bucket/part-?.jsonl"),
                *("hf://gpt2@main", "hf://datasets/a/b@main/c.parquet", "http://host/a.jsonl"),
                "abfs://container@account.dfs.core.windows.net/a",
                "github://org:repo@ref/a",
            )
        ),
    ],
)
def test_places_are_shown_and_told_apart_without_secrets(place: str, seen: str, known: str) -> None:
    assert (shown(place), unsigned(place)) == (seen, known)


def test_no_message_or_record_holds_secrets() -> None:
    said = f"DATA {SECRET}: line 3 is not JSON (see '{SECRET}')"
    seen = "DATA http://host:8000/a.jsonl: line 3 is not JSON (see 'http://host:8000/a.jsonl')"
    for kind in (UserError, KeptError, MachineError, NotWritten):
        error = kind(said)
        assert str(error) == str(pickle.loads(pickle.dumps(error))) == seen
    assert explain(OSError(f"{SECRET}: 403, forbidden")) == "OSError: http://host:8000/a.jsonl: 403, forbidden"
    config = ExpandConfig(base="sftp://bob:hunter2@host/base", out="out", method="lesa")
    assert config.base in repr(config)
    assert config.model_dump(mode="json", exclude={"out"})["base"] == "sftp://bob@host/base"
    assert config.model_dump()["base"] == config.base


@pytest.mark.parametrize(
    ("place", "whether"),
    [
        *(("/models/base", True), ("models/a::b", True), ("s3://bucket/base", True), ("hf://a/b@main", True)),
        *(("http://host/base", False), ("reference://::http://host/refs.json", False), ("sftp://host/base", False)),
        ("s3://bucket/base::http://host", False),
    ],
)
def test_places_that_others_name_are_of_stores(place: str, whether: bool) -> None:
    assert is_of_a_store(place) is whether


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("https://host/a.jsonl?sig=x", "https://host/a.jsonl"),
        ("simplecache::https://host/a.jsonl?sig=x", "simplecache::https://host/a.jsonl"),
        ("/data/why?/a.jsonl", "/data/why?/a.jsonl"),
        ("s3://bucket/What is it?.jsonl", "s3://bucket/What is it?.jsonl"),
    ],
)
def test_only_a_web_address_has_a_query(place: str, name: str) -> None:
    assert named(place) == name
    assert Source(place, 1, "").kind == ".jsonl"
