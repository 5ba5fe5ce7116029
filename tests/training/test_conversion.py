"""Files' tensors to a model's and back, by transformers' own conversions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.errors import UserError
from lesa_ray.training.conversion import convert, plan_conversions, revert
from lesa_ray.training.model import build
from tests import families

DECODERS = [name for name in families.FAMILIES if name != "bert"]


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
    assert made == {name for name, _ in model.named_parameters()}
    fused = [conversion for conversion in conversions if not conversion.plain]
    assert bool(fused) == (name in ("mixtral", "qwen3_moe"))


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
