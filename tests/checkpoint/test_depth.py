"""config.json of a deeper model: an old layer keeps its settings wherever it stands now."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from lesa_ray import UserError
from lesa_ray.checkpoint.depth import deeper_config

ORIGINS = [0, 1, 1, 2, 3, 3]  # 4 layers to 6: new ones above 1 and above 3


def deeper(**config: Any) -> dict[str, Any]:
    """The configuration of the six-layer model grown from a four-layer one of a family nobody knows."""
    raw = {"model_type": "unheard-of", "num_hidden_layers": 4, **config}
    before = dict(raw)
    result = deeper_config(raw, ORIGINS, 4, "base")
    assert raw == before
    return result


def test_depth_and_nothing_else() -> None:
    assert deeper(hidden_size=8, rope={"theta": [1, 2, 3, 4]}, eos_token_id=[5, 6, 7, 8]) == {
        "model_type": "unheard-of",
        "num_hidden_layers": 6,
        "hidden_size": 8,
        "rope": {"theta": [1, 2, 3, 4]},
        "eos_token_id": [5, 6, 7, 8],
    }
    assert deeper_config({"n_layer": 4, "num_hidden_layers": 4}, ORIGINS, 4, "base")["n_layer"] == 6


def test_lists_follow_their_layers() -> None:
    assert deeper(layer_types=list("abcd"))["layer_types"] == list("abbcdd")
    assert deeper(no_rope_layers=[1, 0, 1, 0])["no_rope_layers"] == [1, 0, 0, 1, 0, 0]
    assert deeper(mlp_only_layers=[1, 3])["mlp_only_layers"] == [1, 2, 4, 5]
    assert deeper(mlp_only_layers=[])["mlp_only_layers"] == []


def test_settings_by_index_follow_their_layers() -> None:
    by_layer = {"1": {"head_dim": 8}, "03": {"head_dim": 16, "num_key_value_heads": 1}}
    assert deeper(per_layer_config=by_layer)["per_layer_config"] == {
        "1": {"head_dim": 8},
        "2": {"head_dim": 8},
        "4": {"head_dim": 16, "num_key_value_heads": 1},
        "5": {"head_dim": 16, "num_key_value_heads": 1},
    }
    for nothing in (None, {}, {"all": {"head_dim": 8}}):  # the last is none that transformers takes
        assert deeper(per_layer_config=nothing)["per_layer_config"] == nothing


def test_an_empty_list_says_nothing() -> None:
    """Llama 4 takes it for its rule by index, which is then spelled out."""
    assert deeper(no_rope_layers=[])["no_rope_layers"] == []
    full = AutoConfig.for_model("llama4_text", num_hidden_layers=4, no_rope_layers=[]).to_dict()
    raw = {**full, "no_rope_layers": []}
    assert deeper_config(raw, ORIGINS, 4, "base")["no_rope_layers"] == [full["no_rope_layers"][i] for i in ORIGINS]
    assert len(set(full["no_rope_layers"])) == 2


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 6), (28, 30)])
def test_max_window_layers_counts_the_same_layers(before: int, after: int) -> None:
    """Layers below it attend fully (Qwen2). Above the depth it is a limit nobody reaches, and stays one."""
    assert deeper(max_window_layers=before)["max_window_layers"] == after


@pytest.mark.parametrize(("before", "after"), [(-1, -1), (0, 0), (1, 2), (2, 3), (3, 5), (7, 9)])
def test_the_last_layer_of_experts_stays_the_last(before: int, after: int) -> None:
    """Ernie 4.5: the index belongs to the layers of experts, and transformers writes that of the top layer."""
    assert deeper(moe_layer_end_index=before)["moe_layer_end_index"] == after
    assert deeper(moe_layer_start_index=2)["moe_layer_start_index"] == 3


@pytest.mark.parametrize("key", ["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 3), (3, 4), (4, 6)])
def test_layers_below_experts_are_counted(key: str, before: int, after: int) -> None:
    assert deeper(**{key: before})[key] == after


@pytest.mark.parametrize("key", ["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"])
def test_a_layer_without_experts_above_others_cannot_be_said(key: str) -> None:
    """Unless there is a list that says it."""
    raw = {"model_type": "unheard-of", "num_hidden_layers": 4, key: 2}
    origins = [0, 1, 2, 1, 2, 3]
    with pytest.raises(UserError, match=rf"{key} = 2: .* layer 3 of the result, one of them \(1\), would lie above"):
        deeper_config(raw, origins, 4, "base")
    listed = {**raw, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
    types = deeper_config(listed, origins, 4, "base")["mlp_layer_types"]
    assert types == ["dense", "dense", "sparse", "dense", "sparse", "sparse"]


def test_a_word_with_a_letter_for_each_layer() -> None:
    assert deeper(hybrid_override_pattern="M-*E")["hybrid_override_pattern"] == "M--*EE"
    hub = {"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M-*-"}
    grown = deeper_config(hub, ORIGINS, 4, "base")
    assert grown == {**hub, "num_hidden_layers": 6, "hybrid_override_pattern": "M--*--"}, "its own code makes the list"


@pytest.mark.parametrize("family", ["minicpm3", "diffllama"])
def test_families_whose_layers_follow_the_depth_are_refused(family: str) -> None:
    """Whatever config.json leaves to the class."""
    with pytest.raises(UserError, match=f"is a {family} model: .* so no layer can be put between"):
        deeper(model_type=family)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "smollm3", "cohere2", "qwen3_next"])
def test_rules_by_index_are_spelled_out_for_the_old_layers(family: str) -> None:
    """What transformers says of each layer of the base, it must say of that layer in the deeper model."""
    raw = AutoConfig.for_model(family, num_hidden_layers=8).to_dict()
    lists = [k for k in ("layer_types", "no_rope_layers", "mlp_layer_types") if isinstance(raw.get(k), list)]
    assert lists
    expected = {key: list(raw[key]) for key in lists}
    for key in lists:
        raw.pop(key)  # as the hub's older files have it
    origins = [0, 1, 2, 3, 3, 4, 5, 5, 6, 7]
    grown = AutoConfig.for_model(**deeper_config(raw, origins, 8, "base")).to_dict()
    for key in lists:
        assert grown[key] == [expected[key][origin] for origin in origins]


def test_dtype_is_said_under_the_name_the_base_uses() -> None:
    for key in ("dtype", "torch_dtype"):
        raw = {"model_type": "llama", "num_hidden_layers": 4, key: "bfloat16"}
        assert deeper_config(raw, ORIGINS, 4, "base", "float32")[key] == "float32"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layer_types": ["a", "b"]}, "layer_types has 2 entries for 4 layers"),
        ({"dropout_by_depth": [0.1, 0.2, 0.3, 0.4]}, "dropout_by_depth seems to hold one value for each"),
        ({"block_configs": [{"n": layer} for layer in range(4)]}, "block_configs seems to hold one value for each"),
        ({"attention_types": [[["global"], 4]]}, "attention_types seems to hold one value"),
        ({"skip_layers": [2]}, "skip_layers = .2. seems to name layers by index"),
        ({"ple_layer_ids": [0, 2]}, "ple_layer_ids = .0, 2. seems to name layers by index"),
        ({"linear": {"kda_layers": [1, 2]}}, "linear.kda_layers = .1, 2. seems to name layers by index"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 chooses layers by index"),
        ({"hybrid_override_pattern": "M-M"}, "hybrid_override_pattern has 3 entries for 4 layers"),
        ({"sliding_window_pattern": 4}, "sliding_window_pattern = 4 chooses layers by index"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2: the last layers share"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: attention is"),
    ],
)
def test_what_cannot_be_changed_soundly_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {says}"):
        deeper(**config)


def test_a_configuration_that_its_class_refuses() -> None:
    raw = {"model_type": "gemma2", "num_hidden_layers": 4, "hidden_size": "wide"}
    with pytest.raises(UserError, match="transformers refuses it"):
        deeper_config(raw, ORIGINS, 4, "base")
