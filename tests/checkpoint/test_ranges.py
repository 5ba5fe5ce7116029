"""Long ranges of a remote file: read side by side they are the same bytes, in order, and no more than asked for."""

from __future__ import annotations

import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from lesa_ray import UserError
from lesa_ray.checkpoint import ranges
from lesa_ray.checkpoint.ranges import read_ahead, read_full, read_into, side_by_side
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training import model as model_module
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.model import build, load
from lesa_ray.training.state_files import StateReader, StateWriter
from lesa_ray.training.trained_state import TrainedState
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


def test_a_local_file_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    buffer = bytearray(3 * PIECE)
    read_into(Storage(str(tmp_path)), "file", 5, memoryview(buffer))
    assert buffer == DATA[5 : 5 + len(buffer)]
    with pytest.raises(UserError, match="file: ends before its header says"):
        read_into(Storage(str(tmp_path)), "file", 5, memoryview(bytearray(len(DATA))))


def eight_from(name: str, start: int) -> Callable[[str, Message], bool]:
    """Whether a request is for one of the eight pieces from `start` on of the file that is named so."""

    def is_one(request: str, headers: Message) -> bool:
        begin = headers.get("range", "").removeprefix("bytes=").partition("-")[0]
        return name in request and begin.isdigit() and start <= int(begin) < start + 8 * ranges.PIECE

    return is_one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # as the model holds it, and not
def test_weights_are_filled_by_ranges_side_by_side(
    dtype: str, bases: Callable[[str], str], store: Moody, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PIECE", 1024)
    monkeypatch.setattr(model_module, "PIECE", 1024)
    local = open_checkpoint(bases("llama"))
    there = Storage(f"s3://bucket/{dtype}")
    stored = {name: local.read(name).to(getattr(torch, dtype)) for name in local.tensors}
    there.write("model.safetensors", save(stored))
    there.write("config.json", json.dumps(local.config).encode())
    checkpoint = open_checkpoint(there.url)
    model = build(checkpoint.config, "test")
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight")
    plan = [c for c in plan_conversions(model, checkpoint.tensors, "test") if c.sources[0] in names]
    model.to_empty(device="cpu")
    most = hold_until(store, 8, eight_from("model.safetensors", checkpoint.tensors[names[0]].offset))
    load(model, checkpoint, plan)
    assert most() == 8
    assert len(plan) == 3
    assert all(torch.equal(model.get_parameter(name), stored[name].float()) for name in names)


@pytest.mark.parametrize("family", ["llama", "mixtral"])  # as the files hold it, and converted
def test_weights_are_filled_from_eight_tensors_at_once(family: str, bases: Callable[[str], str], store: Moody) -> None:
    local = open_checkpoint(bases(family))
    there = Storage(f"s3://bucket/{family}")
    for name in local.files:
        there.write(name, local.storage.read(name))
    checkpoint = open_checkpoint(there.url)
    model, expected = build(local.config, "test"), build(local.config, "test")
    plan = plan_conversions(model, checkpoint.tensors, "test")
    sources = [name for c in plan if c.plain == (family == "llama") for name in c.sources][:8]
    starts = {(checkpoint.tensors[name].file, checkpoint.tensors[name].offset) for name in sources}

    def is_one(request: str, headers: Message) -> bool:
        begin = headers.get("range", "").removeprefix("bytes=").partition("-")[0]
        return begin.isdigit() and (request.rsplit("/", 1)[-1], int(begin)) in starts

    model.to_empty(device="cpu")
    expected.to_empty(device="cpu")
    most = hold_until(store, 8, is_one)
    load(model, checkpoint, plan)
    assert most() == len(starts) == 8
    load(expected, local, plan)
    reference = dict(AutoModelForCausalLM.from_pretrained(local.base).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference[name]), name
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_tensors_of_a_training_checkpoint_are_read_eight_at_once(store: Moody) -> None:
    state = {f"model.w{number}": torch.randn(100) for number in range(8)}
    there = Storage("s3://bucket/tensors")
    dcp.save(state, storage_writer=StateWriter(there), no_dist=True)
    found = {name: torch.zeros(100) for name in state}
    most = hold_until(store, 8, lambda request, headers: ".distcp" in request and is_range(request, headers))
    dcp.load(found, storage_reader=StateReader(there), no_dist=True)
    assert most() == 8
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_what_is_under_way_is_bounded() -> None:
    sizes = random.Random(1).choices([1, PIECE, 3 * PIECE, 9 * PIECE], k=200)
    lock, held, most = threading.Lock(), 0, 0

    def call(number: int) -> int:
        nonlocal held, most
        with lock:
            held += sizes[number]
            most = max(most, held)
            assert held <= 8 * PIECE or held == sizes[number]
        return number

    calls = ((size, functools.partial(call, number)) for number, size in enumerate(sizes))
    for place, number in enumerate(side_by_side(calls)):
        assert number == place
        time.sleep(0.001)
        with lock:
            held -= sizes[number]
    assert place == 199
    assert most == 9 * PIECE


def test_a_call_that_fails_ends_the_rest() -> None:
    begun = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise UserError("three")
        return number

    with pytest.raises(UserError, match="three"):
        list(side_by_side((1, functools.partial(call, number)) for number in range(100)))
    assert len(begun) <= 3 + 8


def test_a_training_checkpoint_is_read_by_ranges_side_by_side(store: Moody) -> None:
    weight = torch.randn(8, PIECE // 4)
    there = Storage("s3://bucket/state")
    dcp.save({"model.w": weight}, storage_writer=StateWriter(there), no_dist=True)
    most = hold_until(store, 8, eight_from(".distcp", 0))
    assert torch.equal(TrainedState(there.url).read("w"), weight)
    assert most() == 8
    store.answers = lambda request, headers: None
    (name,) = [name for name in there.list() if name.endswith(".distcp")]
    there.write(name, there.read(name)[:-9])
    with pytest.raises(UserError, match=r"training checkpoint .*: is damaged \(.*ends before its header says"):
        TrainedState(there.url).read("w")


def test_reads_that_bring_less_than_is_there_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: real(file, [views[0][:7]], at))
    data = bytes(range(100))
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb") as file:
        found = bytearray(60)
        assert read_full(file.fileno(), memoryview(found), 30)
        assert bytes(found) == data[30:90]
        assert not read_full(file.fileno(), memoryview(found), 41)
