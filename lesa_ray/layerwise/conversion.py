"""An ordinary checkpoint's config.json as that of a layer-wise scaled model, whose layers may then differ in width.

Nothing else changes: parameters have Llama's names, and what is computed is Llama's code. So only what that code
computes can be converted: Llama, and Mistral where no window slides, as transformers' two model files then differ in
names alone. Qwen 2 has biases at q, k and v but not at o, which Llama's configuration cannot say; Qwen 3 norms queries
and keys; Gemma scales embeddings. Mistral's defaults are not Llama's, so they are spelled out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesa_ray.checkpoint.depth import completed_config
from lesa_ray.errors import UserError
from lesa_ray.layerwise.names import AUTO_MAP, MODEL_CLASS, MODEL_TYPE

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", MODEL_TYPE: MODEL_CLASS}
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
"""Llama's settings that Mistral has too."""
_ROPE = ("rope_theta", "rope_scaling")
"""Older spellings of rope_parameters."""


def require_convertible(raw: Mapping[str, Any], base: str) -> None:
    """Raises: UserError for a model that the class of layer-wise scaled ones does not compute."""
    family = raw.get("model_type", "unknown")
    why = None
    if family not in _CLASSES:
        why = f"{family} is not"
    elif raw.get("architectures") not in (None, [], [_CLASSES[family]]):
        why = f"{raw['architectures'][0]} is not"
    elif family == "mistral" and (completed_config(dict(raw), base) or {}).get("sliding_window") is not None:
        why = "this one's window slides (sliding_window in config.json)"
    if why is not None:
        raise UserError(
            f"--new-width: BASE {base}: layers of several widths need the class {MODEL_CLASS}, which computes what "
            f"Llama does, and Mistral without a sliding window: {why}; leave it out"
        )


def as_layerwise(raw: Mapping[str, Any], base: str, layers: int) -> dict[str, Any]:
    """The same model's config.json for the class of layer-wise scaled ones. `require_convertible` holds.

    raw: the base's config.json; layers: how many it has."""
    config = dict(raw)
    if config["model_type"] == MODEL_TYPE:
        return config
    if config["model_type"] == "mistral":
        full = completed_config(config, base)
        assert full is not None
        config = {name: value for name, value in config.items() if name not in (*_ROPE, "sliding_window")}
        config |= {name: full[name] for name in _SPELLED_OUT} | {"intermediate_size": full["intermediate_size"]}
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
