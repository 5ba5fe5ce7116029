"""The language model of a checkpoint that sees or hears as well.

Such files hold a language model below `language_model.`, beside encoders of pictures or sound and what joins them;
config.json has its settings in `text_config`. New layers go into the language model, and what it is trained and
measured on here is text. So it is taken by itself, with the names and settings that it has where it comes alone:
transformers has a class of its own for most (Gemma 3, Mistral Small 3.1, Qwen3.5, Llama 4). Others are, for text alone,
of the class of the language model that they were made of (Qwen2.5-VL, Qwen3-VL, GLM-4.5V). No byte is moved for it:
tensors are read where they lie."""

from __future__ import annotations

import json
import re
from typing import Any

from lesa_ray.checkpoint.brought_code import known_config

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What lies beside the weights for pictures and sound alone."""
KEY_MAPPING = {r"^(?:language_model|text_model)\.": "", r"^model\.(?:language_model|text_model)\.": "model."}
"""From the names in the files to those of the language model, as transformers takes it. The first are those of files
written before transformers 4.52, and of many written since."""
_ALSO = re.compile(r"^(?:lm_head|mtp|model\.(?:embed_tokens|layers|norm))\.")
"""Of the language model too: what it ends in, layers that predict further tokens, and all of it in files that have
`visual.` beside `model.` (Qwen2-VL, Qwen2.5-VL)."""
_SAME_FOR_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
}
"""Model types without a class for text alone, and those that compute the same there. Theirs turn a head's parts by
time, height and width; of text all three are its place, so it is turned as by that alone (M-RoPE; Qwen2-VL, arXiv
2409.12191, section 2.1)."""
_OF_PICTURES = ("mrope_section", "mrope_interleaved")
"""Which parts are turned by which, among the settings of rotary embeddings."""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings that may be given for the whole model alone (Gemma 3 ends a turn with a token of its own)."""


def language_config(raw: dict[str, Any], where: str) -> dict[str, Any] | None:
    """config.json of the language model by itself, every setting said; None where `raw`, the content of a config.json,
    is that of a language model, or of one that transformers has no class for.

    Raises: UserError if transformers refuses it."""
    if not isinstance(raw.get("text_config"), dict) and not isinstance(raw.get("vision_config"), dict):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = known_config(raw, where)
    text = whole and whole.get_text_config()
    if text is None or text is whole:
        return None
    family = _SAME_FOR_TEXT.get(text.model_type, text.model_type)
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    config: dict[str, Any] = json.loads(text.to_json_string(use_diff=False))
    if family != text.model_type:
        config = _renamed(config, family)
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    config["dtype"] = config.get("dtype") or raw.get("dtype", raw.get("torch_dtype"))
    said = {key for key, value in (raw.get("text_config") or {}).items() if value is not None}
    return config | {key: raw[key] for key in _OF_THE_WHOLE if key in raw and key not in said}


def _renamed(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The settings of a language model that computes the same as one of `family`, as that one's."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[family]().to_dict()
    rotary = {key: value for key, value in config["rope_parameters"].items() if key not in (*_OF_PICTURES, "type")}
    renamed = {key: value for key, value in config.items() if key in known}
    return renamed | {"model_type": family, "rope_parameters": rotary}


def language_name(name: str) -> str | None:
    """What a tensor is called in the language model by itself; None for what is no part of it."""
    for pattern, replacement in KEY_MAPPING.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name if _ALSO.match(name) else None


def component(name: str) -> str:
    """The part of a model to which a tensor belongs: `vision_tower` of `model.vision_tower.…`."""
    return name.removeprefix("model.").split(".")[0]
