"""An ordinary checkpoint's config.json as that of a layer-wise scaled model, whose layers may then differ in width.

Nothing else changes: parameters have Llama's names, and what is computed is Llama's code. So only what that code
computes can be converted: Llama, Mistral, and with a setting each Qwen2 (`qkv_bias`: biases at q, k and v, none at o)
and Qwen3 (`qk_norm`: queries and keys are normed), as transformers' model files then differ in names alone. No window
may slide, as Llama has none. Gemma scales embeddings and Phi-3 has its projections in one matrix, so they are left out.
The others' defaults are not Llama's, so they are spelled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesa_ray.checkpoint.depth import completed_config
from lesa_ray.errors import UserError
from lesa_ray.layerwise.names import AUTO_MAP, MODEL_CLASS, MODEL_TYPE

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    MODEL_TYPE: MODEL_CLASS,
}
_FULL_ATTENTION = "full_attention"
_SPELLED_OUT = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
"""Llama's settings that the others have too."""
_ROPE = ("rope_theta", "rope_scaling")
"""Older spellings of rope_parameters."""
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""Nothing slides, so nothing is left to say."""


def require_convertible(raw: Mapping[str, Any], base: str) -> None:
    """Raises: UserError for a model that the class of layer-wise scaled ones does not compute."""
    family = raw.get("model_type", "unknown")
    why = None
    if family not in _CLASSES:
        why = f"{family} is none of them"
    elif raw.get("architectures") not in (None, [], [_CLASSES[family]]):
        why = f"{raw['architectures'][0]} is none of them"
    elif (full := _others(raw, base)) is not None and _slides(full):
        why = "this one's window slides (sliding_window in config.json)"
    elif full is not None and full["hidden_size"] % full["num_attention_heads"]:
        why = f"its code wants heads that divide the width, not {full['num_attention_heads']} for {full['hidden_size']}"
    if why is not None:
        raise UserError(
            f"--new-width: BASE {base}: layers of several widths need the class {MODEL_CLASS}, which computes what "
            f"Llama, Mistral, Qwen2 and Qwen3 do without a sliding window: {why}; leave it out"
        )


def _others(raw: Mapping[str, Any], base: str) -> dict[str, Any] | None:
    """config.json as its class completes it, of a family whose defaults are not Llama's; None for Llama."""
    return None if raw["model_type"] in ("llama", MODEL_TYPE) else completed_config(dict(raw), base)


def _slides(full: Mapping[str, Any]) -> bool:
    """Whether some layer attends to a window: Mistral's all do, of Qwen's those whose type says so."""
    if full["model_type"] == "mistral":
        return full["sliding_window"] is not None
    return any(kind != _FULL_ATTENTION for kind in full["layer_types"])


def as_layerwise(raw: Mapping[str, Any], base: str, layers: int) -> dict[str, Any]:
    """The same model's config.json for the class of layer-wise scaled ones. `require_convertible` holds.

    raw: the base's config.json; layers: how many it has."""
    config = dict(raw)
    if config["model_type"] == MODEL_TYPE:
        return config
    family, full = config["model_type"], _others(raw, base)
    if full is not None:
        config = {name: value for name, value in config.items() if name not in (*_ROPE, *_WINDOW)}
        config |= {name: full[name] for name in (*_SPELLED_OUT, "intermediate_size") if name in full}
        config |= {"attention_bias": family == "qwen3" and full["attention_bias"], "mlp_bias": False}
        config |= {"qkv_bias": True} if family == "qwen2" else {"qk_norm": True} if family == "qwen3" else {}
    heads = config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    return config | {
        "architectures": [MODEL_CLASS],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        "intermediate_sizes": [config["intermediate_size"]] * layers,
        "num_attention_heads_per_layer": [heads] * layers,
        "num_key_value_heads_per_layer": [config["num_key_value_heads"]] * layers,
    }


def with_layer_widths(config: Mapping[str, Any], neurons: Sequence[int], heads: Sequence[int]) -> dict[str, Any]:
    """A layer-wise scaled model's config.json with these FFN widths and query heads, a value for each layer."""
    return {
        **config,
        "intermediate_sizes": list(neurons),
        "num_attention_heads_per_layer": list(heads),
        "intermediate_size": max(neurons),
    }
