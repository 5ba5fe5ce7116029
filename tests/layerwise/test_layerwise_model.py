"""The model: Llama where all layers are alike, sound where they differ, and at home without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lesa_ray import Expanded
from lesa_ray.layerwise.configuration_layerwise_llama import LayerwiseLlamaConfig
from lesa_ray.layerwise.modeling_layerwise_llama import LayerwiseLlamaForCausalLM
from lesa_ray.training.flops import step_flops
from lesa_ray.training.model import _allow_graphs, build
from tests.families import tokens
from tests.layerwise.models import random_model, small_architecture

ALIKE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rope_parameters":
    {"rope_type": "default", "rope_theta": 500_000.0}, "attention_bias": True, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_layers_are_llama_bit_for_bit(tied: bool, attention: str) -> None:
    alike({**ALIKE, "tie_word_embeddings": tied, "attn_implementation": attention}, "llama", {})


@pytest.mark.parametrize(
    ("family", "setting", "changes"),
    [
        ("qwen2", "qkv_bias", {"tie_word_embeddings": True, "attention_bias": False}),
        ("qwen3", "qk_norm", {"tie_word_embeddings": True, "attention_bias": False, "head_dim": 24}),
        ("qwen3", "qk_norm", {"attn_implementation": "eager"}),
    ],
)
def test_with_one_setting_they_are_qwen_bit_for_bit(family: str, setting: str, changes: dict[str, Any]) -> None:
    own = alike({**ALIKE, **changes}, family, {setting: True})
    names = {name.rsplit(".", 2)[1] for name in own.state_dict() if name.endswith(("bias", "_norm.weight"))}
    heads = {"q_norm", "k_norm"} if family == "qwen3" else set()
    projections = {"q_proj", "k_proj", "v_proj", *(["o_proj"] if own.config.attention_bias else [])}
    assert names == heads | (projections if own.config.attention_bias or family == "qwen2" else set())
    own.set_attn_implementation("eager")
    out = own(input_ids=tokens(), output_attentions=True, output_hidden_states=True)
    assert (len(out.attentions), len(out.hidden_states)) == (3, 4)


def alike(given: dict[str, Any], family: str, settings: dict[str, bool]) -> PreTrainedModel:
    """The model, asserting that it has the parameters of a family's own and computes the same in the same bits."""
    theirs = random_of(given, family)
    own = LayerwiseLlamaForCausalLM(LayerwiseLlamaConfig(**given, **settings))
    assert own.load_state_dict(theirs.state_dict()) is not None
    assert list(own.state_dict()) == list(theirs.state_dict())
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    for model in (theirs, own):
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in own.named_parameters())
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}, {"use_cache": False}):
            assert torch.equal(own(input_ids=ids, **more).logits, theirs(input_ids=ids, **more).logits)
        made = [model.generate(ids, max_new_tokens=12, do_sample=False) for model in (own, theirs)]
    assert torch.equal(*made)
    ready: PreTrainedModel = own
    return ready


def random_of(given: dict[str, Any], family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        attention = given.get("attn_implementation")
        config = AutoConfig.for_model(family, **{k: v for k, v in given.items() if k != "attn_implementation"})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("qwen", [{}, {"qkv_bias": True, "qk_norm": True}])
@torch.no_grad()
def test_the_cache_changes_nothing_where_layers_differ(qwen: dict[str, bool]) -> None:
    model = random_model({**small_architecture(), **qwen})
    ids = tokens(2, 24)
    whole = model(input_ids=ids, use_cache=False).logits
    cache, steps = None, []
    for at in range(ids.shape[1]):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    made = [model.generate(ids, max_new_tokens=16, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*made)


@torch.no_grad()
def test_each_layer_has_its_own_heads_and_the_models_attention() -> None:
    raw = small_architecture()
    model = random_model(raw)
    ids = tokens(2, 10)
    before = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, before, rtol=1e-5, atol=1e-5)
    assert [attention.shape[1] for attention in out.attentions] == raw["num_attention_heads_per_layer"]
    assert len(set(raw["num_attention_heads_per_layer"])) > 1
    assert len(out.hidden_states) == raw["num_hidden_layers"] + 1


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    raw = small_architecture()
    model = random_model(raw)
    model.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert type(again) is LayerwiseLlamaForCausalLM
    for key in ("intermediate_sizes", "num_attention_heads_per_layer", "num_key_value_heads_per_layer"):
        assert getattr(again.config, key) == raw[key]
    ids = tokens()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


ALONE = """
import json, sys
sys.modules["lesa_ray"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for folder, out in zip(sys.argv[2::2], sys.argv[3::2]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
    kind = type(model)
    torch.save({"logits": logits, "made": made, "class": kind.__name__, "module": kind.__module__}, out)
"""


def test_it_loads_in_a_fresh_process_that_has_only_the_folder(
    layerwise_folder: str, bases: Callable[[str], str], grow: Callable[..., Expanded], tmp_path: Path
) -> None:
    """A model made so, and ordinary ones whose new layers are narrower."""
    ids = tokens(1, 12)
    narrower = [grow(bases(name), method="copy", layers=6, new_width=0.5).out for name in ("llama", "qwen2", "qwen3")]
    folders = {folder: str(tmp_path / f"{at}.pt") for at, folder in enumerate([layerwise_folder, *narrower])}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    pairs = [name for pair in folders.items() for name in pair]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(ids.tolist()), *pairs],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=360, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, left in folders.items():
        found = torch.load(left)
        assert found["class"] == "LayerwiseLlamaForCausalLM"
        assert found["module"].startswith("transformers_modules.")
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(found["logits"], model(input_ids=ids).logits)
            assert torch.equal(found["made"], model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"intermediate_sizes": [64] * 4}, "intermediate_sizes = .*expected 5 whole numbers above 0"),
        ({"intermediate_sizes": [64, 64, 0, 64, 64]}, "expected 5 whole numbers above 0"),
        ({"num_key_value_heads_per_layer": [2, 2, 3, 2, 2]}, "layer 2: 3 KV heads do not divide its 8 query heads"),
    ],
)
def test_lists_that_fit_no_model_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AutoConfig.for_model(**{**small_architecture(), **changed})


def test_flops_follow_each_layers_heads() -> None:
    raw = small_architecture()
    model = build(raw, "here")
    tokens_of_a_step, length = 96, 32
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = sum(2 * length * heads * 2 * 8 for heads in raw["num_attention_heads_per_layer"])
    expected = tokens_of_a_step * (6 * matrices + 3 * attention)
    assert step_flops(model, tokens=tokens_of_a_step, seq_len=length, lowest_layer=None) == expected


@torch._dynamo.config.patch(recompile_limit=8)
def test_layers_of_any_shape_are_all_compiled() -> None:
    """They share their code, of which torch compiles eight shapes by default and runs further ones as they are."""
    torch._dynamo.reset()
    model = random_model(small_architecture(profile="vanilla", layers=10, beta="0.5,4", alpha="0.25,1"))
    assert len(set(model.config.intermediate_sizes)) == 10
    _allow_graphs(10)
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    torch._dynamo.reset()
    assert counter.frame_count == 10
