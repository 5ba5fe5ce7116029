"""The configuration of a deeper model: every key that follows depth, changed along.

Besides the number of layers these are lists with one value for each layer (`layer_types`, …), lists of layer indices
(`mlp_only_layers`, …), settings by layer index (`per_layer_config`) and bounds (`max_window_layers`, …). Each old layer
keeps its own values; a new one takes those of the layer below it. Many configurations leave such a list to a rule by
index (Gemma 2: every second layer attends to a window). In a deeper model the rule would hit other layers, so the list
is spelled out, as transformers' own configuration class completes it (no remote code is run). A list that looks like
one value per layer and is not known is an error, never a guess."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from lesa_ray.checkpoint.brought_code import known_config
from lesa_ray.checkpoint.settings import DEPTH_KEYS, config_depth
from lesa_ray.errors import UserError

PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "hybrid_override_pattern",
    "indexer_types",
    "attention_layers",
    "layer_rope_theta",
    "intermediate_sizes",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
)
"""Lists with one value for each layer, or a word with one letter for each (Nemotron-H's pattern)."""
LAYER_INDICES = ("mlp_only_layers", "moe_layers", "full_attention_layers", "attn_layer_indices", "full_attn_idxs")
"""Lists of the indices of the layers that are special."""
_BY_LAYER = "per_layer_config"
"""Settings that differ from the model's own, by layer index: transformers' for any family (Gemma 4)."""
_FIRST_OF_EXPERTS = ("moe_layer_start_index", "first_k_dense_replace", "num_dense_layers")
"""The first layer of experts, above dense ones (Ernie 4.5, DeepSeek, LFM 2)."""
_FIRST_ABOVE = ("max_window_layers", *_FIRST_OF_EXPERTS)
"""The first layer of another kind than those below it (Qwen 2: of a window)."""
BY_INDEX = (
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "global_attn_every_n_layers",
    "full_attention_interval",
    "dense_attention_every_n_layers",
    "attn_layer_period",
    "expert_layer_period",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "decoder_sparse_step",
    "moe_layer_interval",
)
"""Rules by index. They are safe where transformers spells them out in a list, else they must be 1 or absent."""
_SCALED_BY_DEPTH = "what each layer adds is divided by the root of the number of layers"
_FOLLOWS_DEPTH = {
    "num_kv_shared_layers": "the last layers share one layer's keys and values",
    "hidden_size_per_layer_input": "each layer has embeddings of its own",
    "scale_attn_by_inverse_layer_idx": "attention is divided by the layer's index",
    "scale_depth": _SCALED_BY_DEPTH,
}
"""Settings that tie a layer to its place: moved there by a new layer below, an old one would compute something else."""
_FAMILY_FOLLOWS_DEPTH = {
    "diffllama": "its attention takes lambda_init from the layer's index",
    "minicpm3": _SCALED_BY_DEPTH,
}
"""Families that do so whatever their settings."""
_NOT_PER_LAYER = (
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "time_step_limit",
    "mlp_multipliers",
    "ssm_multipliers",
)
_INDICES_NAME = re.compile(r"layer.*(_|\b)(ids|idxs|indices|indexes)$|_layers$")
NO_LISTS = ("llama", "mistral", "gpt2", "gpt_neox", "opt", "bert", "mixtral")
"""Families without any per-layer setting: the import of transformers (2 to 3 s) is saved."""


def deeper_config(
    raw: dict[str, Any], origins: list[int], base_layers: int, base: str, dtype: str | None = None
) -> dict[str, Any]:
    """The result's config.json.

    raw: the base's; origins: for each layer of the result the base layer whose settings it takes.
    dtype: the element type of the result if it changes.
    Raises: UserError naming the key that cannot be changed soundly.
    """
    depth = config_depth(raw)
    assert depth is not None
    config = {**copy.deepcopy(raw), **_spelled_out(raw, base_layers, base)}
    for key, why in _FOLLOWS_DEPTH.items():
        if config.get(key):
            raise UserError(f"BASE {base}: config.json: {key} = {config[key]}: {why}, so no layer can be put between")
    family = str(raw.get("model_type"))
    if family in _FAMILY_FOLLOWS_DEPTH:
        raise UserError(
            f"BASE {base}: is a {family} model: {_FAMILY_FOLLOWS_DEPTH[family]}, so no layer can be put between"
        )
    for key, value in config.items():
        if key in PER_LAYER and value == []:
            continue  # nothing is said of any layer
        if key in PER_LAYER and isinstance(value, list | str) and len(value) != base_layers:
            raise UserError(f"BASE {base}: config.json: {key} has {len(value)} entries for {base_layers} layers")
        if follows_layers(key, value):
            config[key] = followed(key, value, origins, base_layers)
            continue
        if key == "attention_types" or (key not in _NOT_PER_LAYER and _looks_per_layer(value, base_layers)):
            raise UserError(
                f"BASE {base}: config.json: {key} seems to hold one value for each of the {base_layers} layers, "
                "and how it should grow is not known; please report this model"
            )
        for name, inner in {key: value, **_inner(key, value)}.items():
            if _INDICES_NAME.search(name) and _looks_like_indices(inner, base_layers):
                raise UserError(
                    f"BASE {base}: config.json: {name} = {inner} seems to name layers by index, "
                    "and what they should become is not known; please report this model"
                )
    if "mlp_layer_types" not in config:
        _check_order(config, raw, origins, base)
    for key in DEPTH_KEYS:
        if config.get(key) == depth[1]:
            config[key] = len(origins)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config


def _check_order(config: dict[str, Any], raw: dict[str, Any], origins: Sequence[int], base: str) -> None:
    """Raises: UserError if layers below a bound of experts would lie above others, which it cannot say."""
    for key in _FIRST_OF_EXPERTS:
        if not follows_layers(key, raw.get(key)):
            continue
        for layer, origin in enumerate(origins):
            if origin < raw[key] and layer >= config[key]:
                raise UserError(
                    f"BASE {base}: config.json: {key} = {raw[key]}: layers below that are of another kind, and layer "
                    f"{layer} of the result, one of them ({origin}), would lie above others; choose other positions"
                )


def follows_layers(key: str, value: object) -> bool:
    """Whether a setting says something of single layers in a way that is known."""
    if key in PER_LAYER:
        return isinstance(value, list | str)
    if key in LAYER_INDICES:
        return isinstance(value, list)
    if key == _BY_LAYER:
        return isinstance(value, dict) and all(str(layer).isdecimal() for layer in value)
    if key == "moe_layer_end_index":
        return type(value) is int and value >= 0  # -1: the last, whatever the depth
    return key in _FIRST_ABOVE and type(value) is int


def followed(key: str, value: Any, origins: Sequence[int], base_layers: int) -> Any:
    """Such a setting's value for a model whose layers take theirs from the layers `origins` of `base_layers`."""
    if key in PER_LAYER:
        values = [value[origin] for origin in origins]
        return "".join(values) if isinstance(value, str) else values
    if key in LAYER_INDICES:
        return [index for index, origin in enumerate(origins) if origin in value]
    if key == _BY_LAYER:
        named = {int(layer): settings for layer, settings in value.items()}
        digits = len(str(len(origins) - 1))
        return {str(at).zfill(digits): named[origin] for at, origin in enumerate(origins) if origin in named}
    if key == "moe_layer_end_index":
        return _moved(value + 1, origins, base_layers) - 1
    return _moved(value, origins, base_layers)


def _inner(key: str, value: object) -> dict[str, Any]:
    """What a dictionary among the settings holds, with the names that lead there."""
    return {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {}


def _moved(bound: int, origins: Sequence[int], base_layers: int) -> int:
    """How many layers lie below a bound that `bound` of the base's did; above the depth it stays as far off."""
    return sum(origin < bound for origin in origins) + max(bound - base_layers, 0)


def _spelled_out(raw: dict[str, Any], base_layers: int, base: str) -> dict[str, list[Any]]:
    """The per-layer lists that the base's config.json leaves to its configuration class."""
    family = raw.get("model_type")
    if family in NO_LISTS:
        return {}
    full = completed_config(raw, base)
    if full is None:
        for key in BY_INDEX:
            if raw.get(key) not in (None, 0, 1) and not any(name in raw for name in PER_LAYER):
                raise UserError(
                    f"BASE {base}: config.json: {key} = {raw[key]} chooses layers by index, and {family} is not known "
                    "to transformers, so which layers it chose cannot be spelled out"
                )
        return {}
    said_by_letters = "hybrid_override_pattern" in raw  # which the family's own code makes a list of
    return {
        key: list(full[key])
        for key in PER_LAYER
        if isinstance(full.get(key), list) and len(full[key]) == base_layers and raw.get(key) in (None, [])
        if not (said_by_letters and key == "layers_block_type")
    }


def completed_config(raw: dict[str, Any], base: str) -> dict[str, Any] | None:
    """config.json as transformers' own class completes it; None for families it does not know.

    Raises: UserError if the class refuses the values.
    """
    from lesa_ray.layerwise.register import register

    register()
    config = known_config(raw, f"BASE {base}")
    return None if config is None else config.to_dict()


def _looks_like_indices(value: object, base_layers: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int and 0 <= v < base_layers for v in value)


def _looks_per_layer(value: object, base_layers: int) -> bool:
    return isinstance(value, list) and len(value) == base_layers
