"""A miniature has the layers it is asked for, and is as small as its architecture lets it be."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from lesa_ray.expansion.miniature import miniature, narrow


def full(family: str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.for_model(family, **settings).to_dict()
    return found


def test_settings_of_layers_follow_those_that_are_kept() -> None:
    raw = miniature(
        {
            "num_hidden_layers": 4,
            "layer_types": list("abcd"),
            "first_k_dense_replace": 3,
            "mlp_only_layers": [1, 3],
            "per_layer_config": {"0": {"head_dim": 1}, "1": {"head_dim": 2}, "3": {"head_dim": 3}},
            "id2label": {0: "no", 1: "yes"},
        },
        keep=[1, 3],
    )
    assert raw["num_hidden_layers"] == 2
    assert raw["layer_types"] == ["b", "d"]
    assert raw["first_k_dense_replace"] == 1
    assert raw["mlp_only_layers"] == [0, 1]
    assert raw["per_layer_config"] == {"0": {"head_dim": 2}, "1": {"head_dim": 3}}
    assert raw["id2label"] == {0: "no", 1: "yes"}


def test_no_more_layers_than_there_are() -> None:
    assert miniature({"num_hidden_layers": 1, "layer_types": ["a"]})["layer_types"] == ["a"]


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({"num_experts": 128, "num_experts_per_tok": 8}, 8),
        ({"num_experts": 8, "num_experts_per_tok": 1}, 2),
        ({"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}, 16),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": None, "topk_group": None}, 6),
        ({"moe_num_experts": 64, "moe_k": 6}, 6),
        ({"num_local_experts": 4, "num_experts_per_tok": 4}, 4),
        ({"num_experts": 16}, 16),
    ],
)
def test_as_few_experts_as_the_choice_among_them_takes(settings: dict[str, Any], experts: int) -> None:
    raw = miniature({"num_hidden_layers": 2, **settings})
    (key,) = (name for name in settings if name.endswith("experts"))
    assert raw[key] == experts


@pytest.mark.parametrize(
    ("config", "heads", "groups", "width"),
    [
        (full("llama", hidden_size=8192, num_attention_heads=64, num_key_value_heads=8), 4, 2, 512),
        (full("llama", hidden_size=4096, num_attention_heads=32), 4, 4, 512),
    ],
)
def test_a_wide_model_is_made_narrow(config: dict[str, Any], heads: int, groups: int, width: int) -> None:
    raw = miniature(config, also=narrow(config))
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["hidden_size"]) == (heads, groups, width)


@pytest.mark.parametrize(
    "config", [{"num_attention_heads": 4, "hidden_size": 64}, {"n_head": 12, "n_embd": 770}, {"state_size": 8}]
)
def test_what_is_narrow_or_cannot_be_divided_stays(config: dict[str, Any]) -> None:
    assert narrow(config) == {}


def test_gpt2_has_other_names_for_its_sizes() -> None:
    raw = miniature(full("gpt2", n_embd=768, n_head=12), also=narrow(full("gpt2", n_embd=768, n_head=12)))
    assert (raw["n_head"], raw["n_embd"]) == (4, 256)
