"""Shards whose sources lie in the same S3: the server copies, the bytes are those of a plain copy, nothing is left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load, save
from transformers import LlamaConfig, LlamaForCausalLM

from lesa_ray import ExpandConfig, UserError, expand
from lesa_ray.checkpoint import part_plan, server_copy
from lesa_ray.checkpoint.header import read_entries
from lesa_ray.checkpoint.shards import OutTensor, Shard, Span
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import copy_file, write_shard
from lesa_ray.expansion.runner import InlineRunner
from tests.moody import Moody

MIB = 2**20
Left = Callable[[], list[str]]
REFUSALS = {
    "not implemented": (501, b"<Error><Code>NotImplemented</Code></Error>"),
    "denied": (403, b"<Error><Code>AccessDenied</Code></Error>"),
}


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_plan, "_COPIED", 8 * MIB)


@functools.cache
def base() -> dict[str, torch.Tensor]:
    """20 MiB in a row (`a`, `b`), then `c`, `d` and `e`: 6 MiB, small, 12 MiB."""
    generator = torch.Generator().manual_seed(0)
    rows = {"a": 2048, "b": 18 * 1024, "c": 6 * 1024, "d": 3, "e": 12 * 1024}
    return {name: torch.randn(count, 256, generator=generator) for name, count in rows.items()}


def place(storage: Storage) -> dict[str, Span]:
    """Save the base in a folder; where its tensors lie."""
    storage.write("base.safetensors", save(base()))
    entries = read_entries(storage, "base.safetensors")
    return {e.name: Span(storage.url, e.file, e.offset, e.nbytes, e.dtype, e.name, check=True) for e in entries}


def shard(spans: dict[str, Span]) -> Shard:
    """The long run and a last one copied, between them what must be made or is too short."""
    tensors = base()

    def copied(name: str, dtype: str = "F32") -> OutTensor:
        return OutTensor(f"{name}.{dtype}", dtype, tuple(tensors[name].shape), spans[name])

    zeros, made = OutTensor("zeros", "F32", (100, 3), None), OutTensor("made", "F32", (5,), None)
    row = (copied("a"), copied("b"), copied("d"), zeros, copied("a", "BF16"), made, copied("d"), copied("e"))
    return Shard(
        "model.safetensors", tuple(OutTensor(f"{i}.{t.name}", t.dtype, t.shape, t.source) for i, t in enumerate(row))
    )


def make(name: str) -> torch.Tensor:
    return torch.arange(5.0) if name.endswith("made") else torch.zeros(100, 3)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The shard as it is written in a local folder."""
    storage = Storage(str(tmp_path_factory.mktemp("local")))
    write_shard(storage, shard(place(storage)), make)
    return storage.read("model.safetensors")


def traffic(store: Moody) -> tuple[int, int]:
    """Bytes sent and received."""
    return sum(sent for _, sent, _ in store.passed), sum(received for _, _, received in store.passed)


def test_old_bytes_do_not_pass(store: Moody, uploads_left: Left, expected: bytes) -> None:
    spans, out = place(Storage("s3://other/base")), Storage("s3://bucket/out")
    store.passed.clear()
    write_shard(out, shard(spans), make)
    sent, received = traffic(store)
    assert len(expected) > 33 * MIB
    assert sent < 5.1 * MIB + 5.1 * MIB  # two stretches, of which the converted tensor is one MiB
    assert received < 5.1 * MIB + 5.1 * MIB + 2 * MIB  # as much as that needs, and the wide values of the converted one
    assert out.read("model.safetensors") == expected
    assert uploads_left() == []


def test_a_file_is_copied_whole(store: Moody, uploads_left: Left) -> None:
    source, target = Storage("s3://bucket/whole"), Storage("s3://bucket/other folder")
    data = save(base())
    source.write("a file+.safetensors", data)
    source.write("small", b"small")
    store.passed.clear()
    copy_file(source, target, "a file+.safetensors", len(data))
    assert sum(traffic(store)) < 10_000
    copy_file(source, target, "small", 5)
    assert (target.read("a file+.safetensors"), target.read("small")) == (data, b"small")
    assert uploads_left() == []


@pytest.mark.parametrize("why", REFUSALS)
def test_a_server_that_refuses_is_asked_once(why: str, store: Moody, uploads_left: Left, expected: bytes) -> None:
    asked = 0

    def refuse(request: str, headers: Message) -> tuple[int, bytes] | None:
        nonlocal asked
        asked += "x-amz-copy-source" in headers
        return REFUSALS[why] if "x-amz-copy-source" in headers else None

    spans, out = place(Storage("s3://bucket/base")), Storage("s3://bucket/refused")
    store.answers = refuse
    write_shard(out, shard(spans), make)
    assert out.read("model.safetensors") == expected
    assert asked > 0
    before = asked
    out.remove("model.safetensors")
    write_shard(out, shard(spans), make)
    assert out.read("model.safetensors") == expected
    assert asked == before
    assert uploads_left() == []


@pytest.fixture
def rclone(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that knows no copies of ranges."""
    monkeypatch.setattr(server_copy, "_refused", set())
    S3FileSystem.clear_instance_cache()
    yield s3
    S3FileSystem.clear_instance_cache()


def test_a_server_that_takes_copies_for_empty_parts(rclone: str, expected: bytes) -> None:
    out = Storage(f"{rclone}/empty-parts/out")
    write_shard(out, shard(place(Storage(f"{rclone}/empty-parts/base"))), make)
    assert len(server_copy._refused) == 1
    assert out.read("model.safetensors") == expected
    assert out.list() == {"model.safetensors": len(expected)}
    assert [u for u in out.fs.list_multipart_uploads("bucket") if "empty-parts" in u["Key"]] == []


def test_a_server_that_copies_whole_objects_for_ranges(store: Moody, expected: bytes) -> None:
    spans, out = place(Storage("s3://bucket/base")), Storage("s3://bucket/whole-objects")
    store.forgets = frozenset({"x-amz-copy-source-range"})
    write_shard(out, shard(spans), make)
    assert out.read("model.safetensors") == expected


def test_a_source_that_changes_meanwhile(store: Moody, uploads_left: Left) -> None:
    spans, out = place(Storage("s3://bucket/base")), Storage("s3://bucket/changed")
    tag = str(Storage("s3://bucket/base").info("base.safetensors")["ETag"])

    def compare(request: str, headers: Message) -> tuple[int, bytes] | None:
        """As S3 does; moto ignores the header."""
        if "x-amz-copy-source" in headers:
            assert headers["x-amz-copy-source-if-match"] == tag
        changed = "bytes=1" in headers.get("x-amz-copy-source-range", "")  # a later part
        return (412, b"<Error><Code>PreconditionFailed</Code></Error>") if changed else None

    store.answers = compare
    with pytest.raises(UserError, match=r"base\.safetensors in s3://bucket changed while it was copied"):
        write_shard(out, shard(spans), make)
    store.answers = lambda request, headers: None
    assert out.list() == {}
    assert uploads_left() == []


def test_a_source_that_is_shorter_than_its_header_says(store: Moody, uploads_left: Left) -> None:
    storage, out = Storage("s3://bucket/short"), Storage("s3://bucket/short-out")
    spans = place(storage)
    storage.write("base.safetensors", storage.read("base.safetensors", 0, 30 * MIB))
    with pytest.raises(UserError, match=r"base\.safetensors: ends before its header says"):
        write_shard(out, shard(spans), make)
    assert not server_copy._refused  # that was not the server's fault
    assert out.list() == {}
    assert uploads_left() == []


def test_a_failure_while_the_server_copies_leaves_what_was(store: Moody, uploads_left: Left) -> None:
    spans, out = place(Storage("s3://bucket/base")), Storage("s3://bucket/failed")
    out.write("model.safetensors", b"old")
    with pytest.raises(UserError, match=r"the new tensor 3\.zeros holds NaN or Inf"):
        write_shard(out, shard(spans), lambda name: make(name) + float("nan"))
    assert any("uploadId" in request for request, _, _ in store.passed)
    assert out.read("model.safetensors") == b"old"
    assert uploads_left() == []


@pytest.mark.parametrize("mood", ["refuses", "cuts"])
def test_a_server_that_fails_now_and_then(mood: str, store: Moody, uploads_left: Left, expected: bytes) -> None:
    spans, out = place(Storage("s3://bucket/base")), Storage(f"s3://bucket/{mood}")
    store.passed.clear()
    setattr(store, mood, lambda number: number % 4 == 0)
    write_shard(out, shard(spans), make)
    assert store.refused + store.cut >= 4
    setattr(store, mood, lambda number: False)
    assert traffic(store)[0] < 20 * MIB
    assert out.read("model.safetensors") == expected
    assert uploads_left() == []


def test_old_layers_of_an_expansion_do_not_pass(store: Moody, uploads_left: Left, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    remote = Storage("s3://bucket/model")
    for file in (tmp_path / "base").iterdir():
        remote.write(file.name, file.read_bytes())
    store.passed.clear()
    out = Storage("s3://bucket/deeper")
    expand(ExpandConfig(base=remote.url, out=out.url, method="solar"), runner=InlineRunner())
    sent, received = traffic(store)
    local = Storage(str(tmp_path / "out"))
    expand(ExpandConfig(base=str(tmp_path / "base"), out=local.url, method="solar"), runner=InlineRunner())
    weights = [name for name in local.list() if name.endswith(".safetensors")]
    assert all(out.read(name) == local.read(name) for name in weights)
    assert sum(local.list()[name] for name in weights) > 35 * MIB
    assert sent + received < 25 * MIB  # headers, and what joins the runs
    assert uploads_left() == []


def test_the_result_is_a_safetensors_file(expected: bytes) -> None:
    """The yardstick itself."""
    tensors = load(expected)
    assert torch.equal(tensors["1.b.F32"], base()["b"])
    assert torch.equal(tensors["4.a.BF16"], base()["a"].bfloat16())
    assert torch.equal(tensors["5.made"], torch.arange(5.0))
