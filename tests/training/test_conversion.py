"""Files' tensors to a model's and back, by transformers' own conversions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.errors import UserError
from lesa_ray.training.conversion import Conversion, convert, model_tensors, plan_conversions, revert
from lesa_ray.training.model import build
from tests import families

DECODERS = [*(name for name in families.FAMILIES if name != "bert"), "deepseek_v3", "qwen3_next"]


@pytest.mark.parametrize("name", DECODERS)
def test_converted_tensors_are_those_transformers_loads_and_go_back(name: str, bases: Callable[[str], str]) -> None:
    checkpoint = open_checkpoint(bases(name))
    model = build(checkpoint.config, name)
    conversions = plan_conversions(model, checkpoint.tensors, name)
    loaded = AutoModelForCausalLM.from_pretrained(bases(name), dtype=torch.float32).state_dict()
    made: set[str] = set()
    for conversion in conversions:
        sources = {source: checkpoint.read(source) for source in conversion.sources}
        for target, tensor in convert(model, conversion, sources).items():
            assert torch.equal(tensor, loaded[target]), target
            made.add(target)
        again = revert(model, conversion, {target: loaded[target] for target in conversion.targets})
        assert again.keys() == sources.keys()
        assert all(torch.equal(again[source], sources[source]) for source in sources)
    assert made == set(model_tensors(model))
    fused = [conversion for conversion in conversions if not conversion.plain]
    assert bool(fused) == (name in ("mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"))


def test_a_fused_expert_of_another_width_is_refused(bases: Callable[[str], str]) -> None:
    checkpoint = open_checkpoint(bases("mixtral"))
    model = build({**checkpoint.config, "intermediate_size": 48}, "test")
    with pytest.raises(UserError, match=r"experts.* in the files, config.json makes it"):
        plan_conversions(model, checkpoint.tensors, "test")


def test_a_missing_and_a_foreign_tensor_are_refused(bases: Callable[[str], str]) -> None:
    checkpoint = open_checkpoint(bases("llama"))
    model = build(checkpoint.config, "test")
    without = {name: entry for name, entry in checkpoint.tensors.items() if "layers.2.mlp.up" not in name}
    with pytest.raises(UserError, match=r"lacks 1 of the 48 .*model.layers.2.mlp.up_proj.weight"):
        plan_conversions(model, without, "test")
    foreign = {**checkpoint.tensors, "model.layers.9.mlp.up_proj.weight": checkpoint.tensors["lm_head.weight"]}
    with pytest.raises(
        UserError, match=r"holds model.layers.9.mlp.up_proj.weight, which LlamaForCausalLM has no place"
    ):
        plan_conversions(model, foreign, "test")


def test_layers_that_predict_further_tokens_are_left_alone(tmp_path: Path) -> None:
    """As many as config.json says there are, from the first index above the model's own layers on."""
    folder = families.make("deepseek_v3", tmp_path, layers=3)
    checkpoint = open_checkpoint(folder)
    raw = {**checkpoint.config, "num_nextn_predict_layers": 1}
    entry = checkpoint.tensors["model.layers.0.input_layernorm.weight"]

    def planned(layer: int, **settings: object) -> list[Conversion]:
        name = f"model.layers.{layer}.eh_proj.weight"
        entries = {**checkpoint.tensors, name: dataclasses.replace(entry, name=name)}
        return plan_conversions(build({**raw, **settings}, "base"), entries, "base")

    sources = {source for conversion in planned(3) for source in conversion.sources}
    assert sources == checkpoint.tensors.keys()
    with pytest.raises(UserError, match=r"holds model\.layers\.4\.eh_proj\.weight, which .* has no place for"):
        planned(4)
    with pytest.raises(UserError, match=r"holds model\.layers\.2\.eh_proj\.weight"):
        planned(2)
    with pytest.raises(UserError, match=r"holds model\.layers\.3\.eh_proj\.weight"):
        planned(3, num_nextn_predict_layers=0)
