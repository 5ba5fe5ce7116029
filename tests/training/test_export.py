"""Export: what was frozen is equal bit for bit, what was trained is there, and transformers loads it without a word."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lesa_ray import Expanded
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.report.training_card import training_card
from lesa_ray.training import export as export_module
from lesa_ray.training.export import OutFile, export, export_memory, plan_export, state_of, write_file
from lesa_ray.training.state_files import StateReader
from lesa_ray.training.trained_state import TrainedState
from tests import families
from tests.training.exporting import FACTS, assert_exported, bits, changed, in_new_layers, run, save_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gpt2"])  # sharded, tied in one file, …
def test_frozen_bits_stay_and_it_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = families.make(family, tmp_path / "base", dtype=dtype)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "use_cache": False}))
    trained = changed(base, in_new_layers)
    done = run(base, save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    assert not done.reused
    assert_exported(tmp_path / "out", base, trained)
    model = families.load_strict(tmp_path / "out", family)
    assert model.dtype == dtype
    assert model.config.use_cache is True
    assert families.logits(model, families.tokens()).isfinite().all()
    assert not torch.equal(
        families.logits(model, families.tokens()),
        families.logits(families.load_strict(base, family), families.tokens()),
    )


def test_files_without_a_trained_tensor_are_the_same_files(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt", "made_by": "somebody else"})
    trained = changed(base, lambda name: name == "model.layers.2.mlp.down_proj.weight")
    run(base, save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "base" / index).read_bytes()
    written = json.loads((tmp_path / "base" / index).read_text())["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    files = list((tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        same = (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
        assert same == (file.name != written), file.name


def test_an_expanded_checkpoint_stays_one(
    bases: Callable[[str], str], grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    expanded = grow(bases("llama"), method="llama-pro")
    new = expanded.manifest["new_layers"]
    manifest = Path(expanded.out, "expansion.json")
    manifest.write_text(json.dumps({**expanded.manifest, "base": "hf://somebody/small@main"}))
    trained = changed(expanded.out, lambda name: any(f"layers.{layer}." in name for layer in new))
    run(expanded.out, save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    assert_exported(tmp_path / "out", expanded.out, trained)
    assert (tmp_path / "out/expansion.json").read_bytes() == manifest.read_bytes()
    families.load_strict(tmp_path / "out", "llama")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nbase_model: somebody/small\nbase_model_relation: finetune\n")
    assert "- llama-pro" in card
    assert "grown deeper with [llama-pro](https://arxiv.org/abs/2401.02415) from" in card
    manifest.write_text(json.dumps({"made by": "another tool"}))
    run(expanded.out, save_state(str(tmp_path / "again"), trained), str(tmp_path / "foreign"))
    assert "grown deeper" not in (tmp_path / "foreign/README.md").read_text()
    assert "grown deeper with llama-pro from" in training_card(None, {**expanded.manifest, "paper": ""}, {}, {})
    assert "5 → 8 layers" in card
    assert "not been trained" not in card
    assert "| tokens | 1,228,800 |" in card
    assert "| held-out loss after | 2.5 |" in card
    assert "| data | a book \\| two |" in card
    assert str(tmp_path) not in card


def test_a_tied_weight_that_the_files_hold_twice_is_written_twice(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base", dtype=torch.bfloat16)
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    trained = changed(base, lambda name: name == "model.embed_tokens.weight")
    run(base, save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    twice = {**trained, "lm_head.weight": trained["model.embed_tokens.weight"]}
    assert_exported(tmp_path / "out", base, twice)


def test_side_files_come_along(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    words = {f"w{i}": i for i in range(families.VOCAB)}
    splitter = Tokenizer(WordLevel(words, unk_token="w0"))
    splitter.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="w0")
    tokenizer.save_pretrained(base)
    for name in ("LICENSE", "pytorch_model.bin", "trainer_state.json", "README.md"):
        (tmp_path / "base" / name).write_text("of the base")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))
    run(base, state, str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer"))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w5 w7").input_ids == [5, 7]
    assert loaded.chat_template == tokenizer.chat_template
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "generation_config.json", "README.md", "LICENSE", "training"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"),
    }
    assert (tmp_path / "out/README.md").read_text() != "of the base"


@pytest.mark.parametrize(
    ("given", "of_config", "expected"),
    [
        ({"eos_token_id": 3, "top_k": 9}, 4, {"eos_token_id": [7, 3], "top_k": 9}),
        ({"eos_token_id": [3, 7]}, 4, {"eos_token_id": [3, 7]}),
        ({"top_k": 9}, 4, {"eos_token_id": 7, "top_k": 9}),
        (None, [3, 4], {"bos_token_id": 1, "eos_token_id": [7, 3, 4]}),
        (None, 7, None),
    ],
)
def test_generation_stops_where_an_answer_ends_too(given: Any, of_config: Any, expected: Any, tmp_path: Path) -> None:
    out = Storage(str(tmp_path))
    if given is not None:
        out.write("generation_config.json", json.dumps(given).encode())
    export_module._add_stop(out, {"eos_token_id": of_config, "bos_token_id": 1, "pad_token_id": None}, 7)
    assert (json.loads(out.read("generation_config.json")) if out.list() else None) == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_dtype_is_named_that_most_of_the_files_have(key: str | None, tmp_path: Path) -> None:
    """Of its numbers, not of its tensors, and not where the base names one. transformers reads float32 without it."""
    base = families.make("llama_tied", tmp_path / "base", dtype=torch.float16)
    halves = families.tensors(base)
    small = sorted(halves, key=lambda name: halves[name].numel())[: len(halves) // 2 + 1]
    tensors = {name: tensor.float() if name in small else tensor for name, tensor in halves.items()}
    positions = {"model.position_ids": torch.zeros(10**6, dtype=torch.int64)}
    save_file({**tensors, **positions}, tmp_path / "base/model.safetensors")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (tmp_path / "base/config.json").write_text(json.dumps(config | ({key: "float64"} if key else {})))
    exported = plan_export(open_checkpoint(base), save_state(str(tmp_path / "state"), tensors), "").config
    assert exported[key or "dtype"] == ("float64" if key else "float16")
    assert ("dtype" in exported) == (key != "torch_dtype")


def test_generation_may_stop_at_the_first_token(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    run(base, save_state(str(tmp_path / "state"), changed(base, in_new_layers)), str(tmp_path / "out"), stop=0)
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert (stops if isinstance(stops, list) else [stops])[0] == 0


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize(("dtype", "shard_size"), [("bfloat16", "100KB"), ("float32", "5GB")])
def test_from_scratch(family: str, dtype: Any, shard_size: str, tmp_path: Path) -> None:
    made = families.make(family, tmp_path / "made")
    trained = families.tensors(made)
    config = json.loads((tmp_path / "made/config.json").read_text())
    of_training = {"use_cache": False, "dtype": "float16", "torch_dtype": "float16"}
    config = {k: v for k, v in config.items() if k != "architectures"} | of_training
    out = tmp_path / "out"
    run(None, save_state(str(tmp_path / "state"), trained), str(out), config=config, dtype=dtype, shard_size=shard_size)
    assert (len(list(out.glob("model-*.safetensors"))) > 1) == (shard_size == "100KB")
    after = families.tensors(out)
    assert after.keys() == trained.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, trained[name].to(getattr(torch, dtype))), name
    model = families.load_strict(out, family)
    assert (model.dtype, model.config.use_cache) == (getattr(torch, dtype), True)
    written = json.loads((out / "config.json").read_text())
    assert (written["architectures"], written["dtype"]) == ([type(model).__name__], dtype)
    assert "torch_dtype" not in written


def train(base: str, family: str, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """All parameters of a model, under the names it has in memory; the chosen ones changed."""
    parameters = dict(families.load_strict(base, family, dtype=torch.float32).named_parameters())
    return {n: p.detach() * 1.5 + 0.01 if chosen(n) else p.detach() for n, p in parameters.items()}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox", "pythia", "gpt2_bare"])
def test_names_and_experts_go_back_to_those_of_the_files(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that name tensors otherwise than the model does, or hold each expert by itself."""
    base = families.make(family, tmp_path / "base", dtype=torch.bfloat16)
    values = train(base, family, in_new_layers)
    trained = {name: value for name, value in values.items() if in_new_layers(name)}
    read: list[str] = []
    plain = TrainedState.read
    monkeypatch.setattr(TrainedState, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    run(base, save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    assert sorted(read) == sorted(trained)  # each once, however many experts it holds
    before, after = families.tensors(base), families.tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if not in_new_layers(name):
            assert torch.equal(bits(after[name]), bits(tensor)), name
    for name, parameter in families.load_strict(tmp_path / "out", family).named_parameters():
        assert torch.equal(parameter, values[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox"])
def test_from_scratch_with_the_names_of_files(family: str, tmp_path: Path) -> None:
    made = families.make(family, tmp_path / "made")
    values = train(made, family, lambda name: True)
    config = json.loads((tmp_path / "made/config.json").read_text())
    run(None, save_state(str(tmp_path / "state"), values), str(tmp_path / "out"), config=config, dtype="float32")
    assert families.tensors(tmp_path / "out").keys() == families.tensors(made).keys()
    for name, parameter in families.load_strict(tmp_path / "out", family).named_parameters():
        assert torch.equal(parameter, values[name]), name


def test_from_s3_to_s3(s3: str, tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base", dtype=torch.bfloat16)
    remote = Storage(f"{s3}/export/base")
    for file in Path(base).iterdir():
        remote.write(file.name, file.read_bytes())
    trained = changed(base, in_new_layers)
    out = Storage(f"{s3}/export/out")
    state = save_state(f"{out.url}/training/checkpoints/step-00000007", trained)
    assert run(remote.url, state, out.url).written > 1
    assert run(remote.url, state, out.url).reused
    (tmp_path / "out").mkdir()
    for name in out.list():
        (tmp_path / "out" / name).write_bytes(out.read(name))
    assert_exported(tmp_path / "out", base, trained)
    families.load_strict(tmp_path / "out", "llama")


WORKER = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.training.state_files import StateWriter
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
mesh = dist.init_device_mesh("cpu", (3,))
trained = torch.load(f"{folder}/trained.pt")
state = {f"model.{name}": distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in trained.items()}
dcp.save(state, storage_writer=StateWriter(Storage(f"{folder}/state")))
dist.destroy_process_group()
"""


def test_a_state_that_several_workers_wrote(tmp_path: Path) -> None:
    """64 rows over 3 workers: uneven shards."""
    base = families.make("llama_tied", tmp_path / "base")
    trained = changed(base, in_new_layers)
    torch.save(trained, tmp_path / "trained.pt")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)]) for rank in range(3)]
    assert [worker.wait(timeout=360) for worker in workers] == [0, 0, 0]
    assert len(list((tmp_path / "state").glob("*.distcp"))) == 3
    run(base, str(tmp_path / "state"), str(tmp_path / "out"))
    assert_exported(tmp_path / "out", base, trained)


def test_one_trained_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))
    read, held, counts = TrainedState.read, [], []

    def watched(self: TrainedState, name: str) -> Tensor:
        counts.append(sum(reference() is not None for reference in held))
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TrainedState, "read", watched)
    run(base, state, str(tmp_path / "out"))
    assert len(counts) > 10
    assert set(counts) == {0}


def test_the_one_file_of_an_index_is_found(tmp_path: Path) -> None:
    base = Path(families.make("llama_tied", tmp_path / "base"))
    shard = "model-00001-of-00001.safetensors"
    (base / SINGLE_FILE).rename(base / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(families.tensors(base), shard)}
    (base / INDEX_FILE).write_text(json.dumps(index))
    trained = changed(str(base), in_new_layers)
    run(str(base), save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = min(trained)
    assert torch.equal(model.get_parameter(name).float(), trained[name].to(model.dtype).float())


@pytest.mark.parametrize(("family", "most"), [("llama", 2), ("mixtral", 4)])
def test_what_a_file_takes_is_by_its_largest_trained_parameter(family: str, most: int, tmp_path: Path) -> None:
    base = families.make(family, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = {name: p.detach().float() for name, p in model.named_parameters() if "layers.1." in name}
    plan = plan_export(open_checkpoint(base), save_state(str(tmp_path / "state"), trained), str(tmp_path / "out"))
    assert max(export_memory(plan, file) for file in plan.files) == most * 4 * max(
        tensor.numel() for tensor in trained.values()
    )
    assert export_memory(plan, OutFile("copied.safetensors", 10**12, None)) == 0


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_files_can_be_written_elsewhere(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan and its files travel: each file is written from a copy that was pickled, with where its own trained
    tensors lie."""
    base = families.make(family, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {name: p.detach().float() * 2 for name, p in model.named_parameters() if re.search(r"layers\.[13]\.", name)}
    plan = plan_export(open_checkpoint(base), save_state(str(tmp_path / "state"), state), str(tmp_path / "out"))
    assert len(pickle.dumps(plan)) < 100_000
    parts = []

    def read_metadata(_: StateReader) -> None:
        pytest.fail("a task read all of the metadata")

    def elsewhere(plan: export_module.ExportPlan, files: Any) -> None:
        given = [pickle.dumps((plan, file, state_of(plan, file))) for file in files]
        with monkeypatch.context() as patch:
            patch.setattr(StateReader, "read_metadata", read_metadata)
            for one in given:
                parts.append(pickle.loads(one)[2].shapes)
                write_file(*pickle.loads(one))

    export(plan, FACTS, elsewhere)
    if family == "llama":  # Mixtral's is one file
        assert max(map(len, parts)) < len(state)
    assert set().union(*parts) == state.keys()
    before, after = families.tensors(base), families.tensors(tmp_path / "out")
    for name, tensor in before.items():
        factor = 2 if re.search(r"layers\.[13]\.", name) else 1
        assert torch.equal(after[name], tensor * factor), name


def test_files_written_side_by_side_read_the_state_at_one_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {f"w{number}": torch.full((8,), float(number)) for number in range(2)}
    state = TrainedState(save_state(str(tmp_path / "state"), trained))
    take, both = StateReader._slice_file, threading.Barrier(2)

    def together(self: StateReader, *of_what: object) -> object:
        both.wait(timeout=60)
        return take(self, *of_what)

    monkeypatch.setattr(StateReader, "_slice_file", together)
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(state.read, trained), trained.values()))
