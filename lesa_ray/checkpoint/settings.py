"""Sizes in config.json, under the names that they have from family to family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The number of layers. These keys, as those below, are in the order in which they are looked for."""
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
"""The width of the residual stream."""
HEAD_KEYS = ("num_attention_heads", "n_head")
"""The number of query heads."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The number of experts in a layer."""
CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""How many of them a token is sent to."""
_PREDICTS_FURTHER = "num_nextn_predict_layers"
"""How many layers the files hold above the model's own, for predicting further tokens (DeepSeek-V3, GLM-4.5)."""


def configured(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of some settings that a configuration has as a number."""
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def config_depth(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The key that holds the number of layers, or one value for each (Nemotron-H), and their number; or None."""
    for key in DEPTH_KEYS:
        if isinstance(config.get(key), int):
            return key, config[key]
    kinds = config.get("layers_block_type")
    return ("layers_block_type", len(kinds)) if isinstance(kinds, list) else None


def further_layers(config: Mapping[str, Any]) -> int:
    """How many layers a checkpoint may hold above the model's own: they predict further tokens from what that gives."""
    more = config.get(_PREDICTS_FURTHER)
    return more if isinstance(more, int) else 0


def longest_window(text_config: Any) -> int | None:
    """Positions a model was made for, by its text configuration; None if it has no such bound (Mamba)."""
    positions = getattr(text_config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
