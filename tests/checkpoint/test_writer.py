"""Files written from a plan: the bytes are the sources', the layout is safetensors', the size is the planned one."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from lesa_ray import UserError
from lesa_ray.checkpoint import copying
from lesa_ray.checkpoint.header import read_entries
from lesa_ray.checkpoint.ranges import PIECE
from lesa_ray.checkpoint.shards import OutTensor, Shard, Span, header_bytes, index_bytes, plan_shards
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import TensorFileWriter, write_shard
from tests.allocations import Largest


def source(folder: Path, **tensors: torch.Tensor) -> dict[str, Span]:
    """Save tensors into one file of `folder`; where each lies."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "source.safetensors")
    storage = Storage(str(folder))
    return {
        e.name: Span(storage.url, e.file, e.offset, e.nbytes, e.dtype, e.name, check=True)
        for e in read_entries(storage, "source.safetensors")
    }


def out_tensor(name: str, span: Span, shape: tuple[int, ...], dtype: str | None = None) -> OutTensor:
    return OutTensor(name, dtype or span.dtype, shape, span)


@pytest.mark.parametrize("target", ["local", "memory"])
def test_a_shard_holds_its_sources_bytes_and_zeros(target: str, tmp_path: Path) -> None:
    base = {"a": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(PIECE // 8, 3), "n": torch.arange(4)}
    spans = source(tmp_path / "in", **base)
    tensors = tuple(
        [out_tensor(f"x.{name}", span, tuple(base[name].shape)) for name, span in spans.items()]
        + [OutTensor("zero", "F32", (1000, 3), None), out_tensor("again.a", spans["a"], (7, 3))]
    )
    storage = Storage(str(tmp_path / "out") if target == "local" else "memory://writer")
    shard = Shard("model.safetensors", tensors)
    write_shard(storage, shard)
    assert storage.list() == {"model.safetensors": shard.nbytes}
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(storage.read("model.safetensors"))
    with safe_open(copy, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {t.name for t in tensors}
        for name, tensor in base.items():
            assert torch.equal(file.get_tensor(f"x.{name}"), tensor)
        assert torch.equal(file.get_tensor("again.a"), base["a"])
        assert not file.get_tensor("zero").any()
        assert file.get_tensor("zero").shape == (1000, 3)
    storage.remove_tree()


def test_tensors_that_are_no_neighbours_in_their_source_are_not_taken_for_a_run(tmp_path: Path) -> None:
    base = {name: torch.randn(6) for name in "abcd"}
    spans = source(tmp_path / "in", **base)
    shard = Shard("m.safetensors", tuple(out_tensor(name, spans[name], (6,)) for name in "acdb"))
    write_shard(Storage(str(tmp_path)), shard)
    written = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(written[name], base[name]) for name in base)


@pytest.mark.parametrize("asked_for_again", [True, False])
def test_a_kernel_that_copies_a_little_at_a_time_or_not_at_all(
    asked_for_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"a": torch.randn(1000), "b": torch.randn(999), "c": torch.arange(5)}
    spans = source(tmp_path / "in", **base)
    copy_file_range = os.copy_file_range

    def reluctant(source: int, target: int, count: int, *offsets: int) -> int:
        if not asked_for_again:
            raise OSError(errno.EXDEV, "another filesystem")
        return copy_file_range(source, target, min(count, 1000), *offsets)

    monkeypatch.setattr(os, "copy_file_range", reluctant)
    tensors = tuple(out_tensor(name, span, tuple(base[name].shape)) for name, span in spans.items())
    write_shard(Storage(str(tmp_path)), Shard("m.safetensors", (*tensors, OutTensor("z", "F32", (3,), None))))
    written = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(written[name], base[name]) for name in base)
    assert written["z"].tolist() == [0, 0, 0]


def test_a_disk_that_fails_on_the_way_is_not_taken_for_a_kernel_that_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = source(tmp_path / "in", a=torch.randn(1000))

    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="no space left"):
        write_shard(Storage(str(tmp_path / "out")), Shard("m.safetensors", (out_tensor("a", spans["a"], (1000,)),)))
    assert not list((tmp_path / "out").iterdir())


def test_zeros_longer_than_a_piece_and_what_follows_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(copying, "PIECE", 1000)
    span = source(tmp_path / "in", w=torch.arange(7.0))["w"]
    shard = Shard("z.safetensors", (OutTensor("z", "F32", (701,), None), out_tensor("w", span, (7,))))
    storage = Storage("memory://writer-zeros")
    write_shard(storage, shard)
    written = load(storage.read("z.safetensors"))
    assert written["z"].shape == (701,)
    assert not written["z"].any()
    assert torch.equal(written["w"], torch.arange(7.0))
    storage.remove_tree()


@pytest.mark.parametrize("length", range(1, 10))
def test_data_begin_on_eight_bytes(length: int) -> None:
    """So that readers can map any element type (the safetensors format's advice)."""
    assert len(header_bytes((OutTensor("x" * length, "U8", (1,), None),))) % 8 == 0


def test_zeros_at_the_end_are_there(tmp_path: Path) -> None:
    shard = Shard("z.safetensors", (OutTensor("zero", "BF16", (3, 5), None),))
    write_shard(Storage(str(tmp_path)), shard)
    assert (tmp_path / "z.safetensors").stat().st_size == shard.nbytes
    assert torch.equal(load_file(tmp_path / "z.safetensors")["zero"], torch.zeros(3, 5, dtype=torch.bfloat16))


def test_a_narrower_type_rounds_as_torch_does(tmp_path: Path) -> None:
    weight = torch.randn(300, 7)
    span = source(tmp_path / "in", w=weight)["w"]
    write_shard(Storage(str(tmp_path)), Shard("m.safetensors", (out_tensor("w", span, (300, 7), "BF16"),)))
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], weight.bfloat16())


def test_values_are_scaled_in_float32_and_rounded_once(tmp_path: Path) -> None:
    weight = torch.randn(300, 7).bfloat16()
    before = source(tmp_path / "in", v=torch.ones(9), w=weight)["w"]
    span = dataclasses.replace(before, scale=0.3)
    write_shard(Storage(str(tmp_path)), Shard("m.safetensors", (out_tensor("w", span, (300, 7), "F32"),)))
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], weight.float() * 0.3)
    write_shard(Storage(str(tmp_path)), Shard("n.safetensors", (out_tensor("w", span, (300, 7)),)))
    assert torch.equal(load_file(tmp_path / "n.safetensors")["w"], (weight.float() * 0.3).bfloat16())


def test_a_value_too_large_for_the_narrower_type_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    span = source(tmp_path / "in", w=torch.tensor([1.0, 70_000.0]))["w"]
    with pytest.raises(UserError, match="tensor w holds NaN or Inf, or values too large for float16"):
        write_shard(Storage(str(tmp_path / "out")), Shard("m.safetensors", (out_tensor("w", span, (2,), "F16"),)))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("target", ["local", "memory"])
def test_nan_in_a_source_is_refused_and_leaves_nothing(target: str, tmp_path: Path) -> None:
    spans = source(tmp_path / "in", a=torch.zeros(9), b=torch.tensor([0.0, float("nan")]))
    storage = Storage(str(tmp_path / "out") if target == "local" else "memory://writer-nan")
    shard = Shard("m.safetensors", (out_tensor("a", spans["a"], (9,)), out_tensor("b", spans["b"], (2,))))
    with pytest.raises(UserError, match="tensor b holds NaN or Inf"):
        write_shard(storage, shard)
    assert storage.is_empty()


def test_shards_keep_to_the_limit_and_groups_to_files_of_their_own() -> None:
    def group(prefix: str, *sizes: int) -> list[OutTensor]:
        return [OutTensor(f"{prefix}{i}", "U8", (size,), None) for i, size in enumerate(sizes)]

    shards = plan_shards([group("old", 40, 60, 1, 150, 10), group("new", 30)], limit=100)
    held = [[t.name for t in shard.tensors] for shard in shards]
    assert held == [["old0", "old1"], ["old2"], ["old3"], ["old4"], ["new0"]]
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads(index_bytes(shards))
    assert index["metadata"]["total_size"] == 291
    assert index["weight_map"]["new0"] == "model-00005-of-00005.safetensors"
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert [s.file for s in plan_shards([group("only", 5)], limit=100)] == ["model.safetensors"]


def test_a_unit_writes_what_was_planned_in_that_order_and_finite(tmp_path: Path) -> None:
    planned = (OutTensor("a", "F16", (2, 2), None), OutTensor("b", "F32", (3,), None))
    with Storage(str(tmp_path)).create("u.safetensors") as file:
        writer = TensorFileWriter(file, planned)
        writer.write("a", torch.full((2, 2), 0.5))
        writer.write("b", torch.arange(3.0))
        writer.finish()
    assert torch.equal(load_file(tmp_path / "u.safetensors")["a"], torch.full((2, 2), 0.5, dtype=torch.float16))
    with Storage(str(tmp_path)).create("v.safetensors") as file, pytest.raises(UserError, match=r"the new tensor a .*"):
        TensorFileWriter(file, planned).write("a", torch.full((2, 2), 1e6))


@pytest.mark.parametrize("dtype", [None, "F16"], ids=["copied", "converted"])
def test_a_source_that_was_cut_is_named(dtype: str | None, tmp_path: Path) -> None:
    spans = source(tmp_path / "in", w=torch.randn(100, 30))
    file = tmp_path / "in" / "source.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    shard = Shard("model.safetensors", (out_tensor("w", spans["w"], (100, 30), dtype),))
    with pytest.raises(UserError, match=rf"{file}: ends before its header says"):
        write_shard(Storage(str(tmp_path / "out")), shard)
    assert not list((tmp_path / "out").iterdir())


def test_what_was_made_is_written_in_little_memory_beside_it(tmp_path: Path) -> None:
    """It is written while the next one is computed, on a host that may have room for little more."""
    made = {"w": torch.randn(3000, 500), "t": torch.randn(500, 3000).T, "v": torch.randn(7), "s": torch.tensor(2.0)}
    planned = tuple(OutTensor(name, "BF16", tuple(one.shape), None) for name, one in made.items())
    with Storage(str(tmp_path)).create("made.safetensors") as file, Largest() as noted:
        writer = TensorFileWriter(file, planned)
        for name, one in made.items():
            writer.write(name, one)
        writer.finish()
    assert noted.nbytes < made["w"].nbytes / 4
    written = load_file(tmp_path / "made.safetensors")
    assert all(torch.equal(written[name], one.bfloat16()) for name, one in made.items())
    made["w"][2999, 499] = 3.4e38  # the last value of the last block
    with pytest.raises(UserError, match="the new tensor w holds NaN or Inf in bfloat16; try --dtype float32"):
        TensorFileWriter(io.BytesIO(), planned).write("w", made["w"])
