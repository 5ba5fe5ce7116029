"""Headers and ranges, against what the safetensors library reads."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lesa_ray import UserError
from lesa_ray.checkpoint.header import TensorEntry
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.samples import sample_ranges
from tests import families

Bases = Callable[[str], str]


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_every_tensor_is_the_librarys(family: str, bases: Bases) -> None:
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint(bases(family))))
    expected = families.tensors(bases(family))
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if checkpoint.tensors[name].is_float:
            assert torch.equal(checkpoint.read(name), tensor)
    floats = [t for t in expected.values() if t.is_floating_point()]
    assert checkpoint.parameters == sum(t.numel() for t in floats)
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in expected.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_is_read_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(3, 5).to(dtype)
    save_file({"w": weight, "scalar": torch.tensor(2.0).to(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.read("w"), weight)
    assert checkpoint.read("scalar").item() == 2.0


def test_a_header_longer_than_the_first_read(tmp_path: Path) -> None:
    tensors = {f"{'a-long-name.' * 8}{i}": torch.tensor([float(i)]) for i in range(2000)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert len(checkpoint.tensors) == 2000
    assert all(checkpoint.read(name).item() == tensors[name].item() for name in list(tensors)[::100])


def test_digests_tell_trained_weights_apart_and_copies_not(bases: Bases, tmp_path: Path) -> None:
    base = open_checkpoint(bases("llama"))
    copy = Path(shutil.copytree(bases("llama"), tmp_path / "copy"))
    assert open_checkpoint(str(copy)).digests() == base.digests()
    shard = copy / base.shards[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    changed = open_checkpoint(str(copy)).digests()
    assert [name for name in changed if changed[name] != base.digests()[name]] == [shard.name]


def test_a_digest_sees_every_small_tensor_the_ends_of_large_ones_and_every_name(tmp_path: Path) -> None:
    """All names: checkpoints with two tensors of one shape exchanged have the same bytes behind the header."""
    names = [f"model.layers.{i:03d}.input_layernorm.weight" for i in range(200)]
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({**{name: torch.zeros(1000) for name in names}, "z": torch.zeros(100_000)}, file)
    content = file.read_bytes()
    begin = int.from_bytes(content[:8], "little") + 8
    assert content.index(names[150].encode()) > 10_000  # beyond what a sample at the beginning sees

    def digest(changed: bytes | bytearray) -> object:
        file.write_bytes(changed)
        return open_checkpoint(str(tmp_path)).digests()[file.name]["digest"]

    seen = {digest(content)}
    here, there = names[150].encode(), names[151].encode()
    seen.add(digest(content.replace(here, b"x" * len(here)).replace(there, here).replace(b"x" * len(here), there)))
    places = [begin + 4000 * norm + at for norm in (0, 77, 199) for at in (0, 2000, 3999)]
    large = begin + 4000 * 200
    places += [large, large + 4095, large + 400_000 - 4096, large + 400_000 - 1]
    for place in places:
        seen.add(digest(content[:place] + b"\1" + content[place + 1 :]))
    assert len(seen) == 2 + len(places)


def test_of_very_large_tensors_16_samples_stand_for_all() -> None:
    def ranges(*sizes: int) -> list[tuple[int, int]]:
        offsets = [100 + sum(sizes[:at]) for at in range(len(sizes))]
        return sample_ranges(
            TensorEntry(str(at), "U8", (size,), "f", offset, size)
            for at, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        )

    whole = ranges(2**34)
    assert len(whole) == 16
    assert whole[0] == (100, 4196)
    assert whole[-1][1] == 100 + 2**34
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(whole)]
    assert max(gaps) - min(gaps) <= 1
    assert len(ranges(2**26)) == 4
    assert ranges(2**20, 2**20) == [
        (100, 4196),
        (100 + 2**20 - 4096, 100 + 2**20 + 4096),
        (100 + 2**21 - 4096, 100 + 2**21),
    ]
    assert ranges(0, 10, 0, 20) == [(100, 130)]
    assert max(end - start for start, end in ranges(*[2**16] * 100)) == 2**20


def test_an_index_cannot_point_out_of_the_folder(bases: Bases, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bases("llama"), tmp_path / "copy"))
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text()) if index.exists() else {"weight_map": {"w": ""}}
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a file of this folder"):
        open_checkpoint(str(copy))


def edited_index(folder: Path, change: Callable[[dict[str, str]], object]) -> str:
    """A sharded checkpoint whose index was changed."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return str(folder)


def test_an_index_finds_shards_and_nothing_else(bases: Bases, tmp_path: Path) -> None:
    """transformers loads all that the shards hold, whether or not the index lists it."""
    copy = Path(shutil.copytree(bases("llama"), tmp_path / "copy"))
    lost = ("model.norm.weight", "model.layers.3.mlp.up_proj.weight")

    def change(weight_map: dict[str, str]) -> None:
        weight_map["model.rotary_emb.inv_freq"] = weight_map["model.norm.weight"]  # of old times
        for name in lost:
            weight_map.pop(name)

    found = open_checkpoint(edited_index(copy, change)).tensors
    assert found == open_checkpoint(bases("llama")).tensors


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names(bases: Bases, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bases("llama"), tmp_path / "copy"))
    place = {name: entry.file for name, entry in open_checkpoint(str(copy)).tensors.items()}
    for shard in sorted(copy.glob("*.safetensors")):
        tensors = load_file(shard)
        if shard.name != place["model.norm.weight"]:
            save_file({**tensors, "model.norm.weight": torch.zeros(3)}, shard)
    assert {name: entry.file for name, entry in open_checkpoint(str(copy)).tensors.items()} == place


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_a_single_file_comes_before_an_index(shards_are_there: bool, bases: Bases, tmp_path: Path) -> None:
    """So transformers chooses, too, whether or not there are the shards that the index names."""
    copy = Path(shutil.copytree(bases("llama"), tmp_path / "copy"))
    for shard in () if shards_are_there else list(copy.glob("*.safetensors")):
        shard.unlink()
    save_file({"w": torch.ones(3)}, copy / "model.safetensors")
    checkpoint = open_checkpoint(str(copy))
    assert (checkpoint.shards, list(checkpoint.tensors)) == (("model.safetensors",), ["w"])


def one(begin: int, end: int, **other: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **other}


HEADERS: dict[str, dict[str, object] | str] = {
    "spaces": "  " + json.dumps({"a": one(0, 64)}) + " \n",
    "empty tensors": {
        "z": one(0, 0),
        "a": one(0, 32),
        "n": one(32, 32, shape=[0, 7]),
        "b": one(32, 64),
        "e": one(64, 64),
    },
    "out of order": {"b": one(32, 64), "a": one(0, 32)},
    "an empty one named after what follows it": {"a": one(0, 64), "z": one(0, 0)},
    "metadata": {"__metadata__": {"format": "pt"}, "a": one(0, 64)},
    "an unknown key": {"a": one(0, 64, note="x")},
    "integers": {"a": one(0, 64, dtype="I64", shape=[8])},
    "complex": {"a": one(0, 64, dtype="C64", shape=[2, 4])},
    "a hole in front": {"a": one(4, 64)},
    "a hole": {"a": one(0, 32), "b": one(36, 64)},
    "a hole at the end": {"a": one(0, 32)},
    "shared bytes": {"a": one(0, 32), "b": one(16, 64)},
    "the same bytes": {"a": one(0, 64), "b": one(0, 64)},
    "an empty one within another": {"a": one(0, 64), "b": one(32, 32)},
    "an end before its beginning": {"a": one(0, 64), "b": one(64, 32), "c": one(32, 64)},
    "a negative offset": {"a": one(-4, 60)},
    "a fraction": {"a": one(0, 64, shape=[16.0])},
    "a truth value": {"a": one(0, 64, shape=[True, 16])},
    "words for a shape": {"a": one(0, 64, shape="16")},
    "three offsets": {"a": one(0, 64, data_offsets=[0, 64, 64])},
    "a list of types": {"a": one(0, 64, dtype=["F32"])},
    "a larger shape": {"a": one(0, 64, dtype="I64", shape=[16])},
    "a smaller shape": {"a": one(0, 64, shape=[8])},
    "a list for a tensor": {"a": [["F32"], [16], [0, 64]]},
    "half a character": '{"\\ud800": ' + json.dumps(one(0, 64)) + "}",
    "lists in lists": '{"__metadata__": {"a": ' + "[" * 20_000 + "]" * 20_000 + "}}",
}


@pytest.mark.parametrize("kind", list(HEADERS))
def test_a_header_is_taken_or_refused_as_the_library_does(kind: str, tmp_path: Path) -> None:
    header = HEADERS[kind]
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(64))
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    except SafetensorError:
        with pytest.raises(UserError, match=r"model\.safetensors: .*(safetensors file|damaged|bytes, not those)"):
            open_checkpoint(str(tmp_path))
        return
    found = open_checkpoint(str(tmp_path)).tensors
    assert {name: entry.shape for name, entry in found.items()} == expected


def test_a_configuration_of_lists_in_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 20_000 + "]" * 20_000 + "}")
    with pytest.raises(UserError, match=r"config\.json: is not JSON"):
        open_checkpoint(str(tmp_path))
