"""Every checkpoint of the zoo can be made, loads without a missing or spare tensor, and computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import FAMILIES, layer_tensors, load_strict, logits, make, matches, tensors, tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_makes_loads_and_computes(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path)
    out = logits(load_strict(folder, name), tokens())
    assert torch.isfinite(out).all()
    assert out.std(dim=-1).min() > 0.1, "the logits of some token are all alike"
    assert (out[0] - out[1]).abs().mean() > 0.1, "different tokens give the same logits"


@pytest.mark.parametrize("name", FAMILIES)
def test_files_name_writes_and_norms_and_no_parameter_is_trivial(name: str, tmp_path: Path) -> None:
    family, folder = FAMILIES[name], make(name, tmp_path)
    for key, tensor in tensors(folder).items():
        assert tensor.ndim == 0 or tensor.float().std() > 0.01, f"{key} is constant"
    suffixes = layer_tensors(folder, name, layer=1).keys()
    for pattern in (*family.writes, *family.norms):
        assert any(matches(suffix, (pattern,)) for suffix in suffixes), f"{pattern} is not in {sorted(suffixes)}"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_writes_nothing_is_the_identity_where_the_family_says_so(name: str, tmp_path: Path) -> None:
    """Four layers, the last with its writes at zero, against the three below it."""
    family = FAMILIES[name]
    three = logits(load_strict(make(name, tmp_path / "three", layers=3), name), tokens())
    prefix = f"{family.layer_prefix}3."
    for path in Path(make(name, tmp_path / "four", layers=4)).glob("*.safetensors"):
        changed = load_file(path)
        for key, tensor in changed.items():
            if key.startswith(prefix) and matches(key.removeprefix(prefix), family.writes):
                tensor.zero_()
        save_file(changed, path, metadata={"format": "pt"})
    difference = (logits(load_strict(tmp_path / "four", name), tokens()) - three).abs().max()
    assert (difference == 0) == family.keeps_function


def test_llama_is_sharded_and_tied_llama_is_one_file_without_head(tmp_path: Path) -> None:
    sharded, single = Path(make("llama", tmp_path / "a")), Path(make("llama_tied", tmp_path / "b"))
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert (sharded / "model.safetensors.index.json").exists()
    assert [path.name for path in single.glob("*.safetensors*")] == ["model.safetensors"]
    assert "lm_head.weight" not in tensors(single)


def test_gemma2_shows_a_layer_of_the_wrong_attention_type(tmp_path: Path) -> None:
    folder = Path(make("gemma2", tmp_path))
    right = logits(load_strict(folder, "gemma2"), tokens())
    config = json.loads((folder / "config.json").read_text())
    for layer, kind in enumerate(config["layer_types"]):
        types = list(config["layer_types"])
        types[layer] = "full_attention" if kind == "sliding_attention" else "sliding_attention"
        (folder / "config.json").write_text(json.dumps({**config, "layer_types": types}))
        assert (logits(load_strict(folder, "gemma2"), tokens()) - right).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("name", "expert"),
    [("mixtral", "block_sparse_moe.experts.3.w2.weight"), ("qwen3_moe", "mlp.experts.3.down_proj.weight")],
)
def test_experts_are_stored_one_by_one(name: str, expert: str, tmp_path: Path) -> None:
    assert layer_tensors(make(name, tmp_path), name, 0)[expert].ndim == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_bfloat16_is_float32_rounded_and_a_deeper_model_begins_with_the_shallower(name: str, tmp_path: Path) -> None:
    shallow = tensors(make(name, tmp_path / "float32", layers=2))
    deep = tensors(make(name, tmp_path / "bfloat16", layers=4, dtype=torch.bfloat16))
    for key, tensor in shallow.items():
        assert torch.equal(deep[key], tensor.to(torch.bfloat16)), key
