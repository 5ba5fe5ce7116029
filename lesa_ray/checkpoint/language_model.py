"""The language model of a checkpoint that sees or hears as well.

Such files hold a language model below `language_model.`, beside encoders of pictures or sound and what joins them;
config.json has its settings in `text_config`. New layers go into the language model, and what it is trained and
measured on here is text. So it is taken by itself, with the names and settings that it has where it comes alone:
transformers has a class of its own for most (Gemma 3, Mistral Small 3.1, Qwen3.5, Llama 4). No byte is moved for it:
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
_ALSO = re.compile(r"^(?:lm_head|mtp)\.")
"""Of the language model too: what it ends in, and layers that predict further tokens."""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings that may be given for the whole model alone (Gemma 3 ends a turn with a token of its own)."""


def language_config(raw: dict[str, Any], where: str) -> dict[str, Any] | None:
    """config.json of the language model by itself, every setting said; None where `raw`, the content of a config.json,
    is that of a language model, or of one that transformers has no class for.

    Raises: UserError if transformers refuses it."""
    if not isinstance(raw.get("text_config"), dict):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = known_config(raw, where)
    text = whole and whole.get_text_config()
    if text is None or text is whole or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    config: dict[str, Any] = json.loads(text.to_json_string(use_diff=False))
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    config["dtype"] = config.get("dtype") or raw.get("dtype", raw.get("torch_dtype"))
    said = {key for key, value in raw["text_config"].items() if value is not None}
    return config | {key: raw[key] for key in _OF_THE_WHOLE if key in raw and key not in said}


def language_name(name: str) -> str | None:
    """What a tensor is called in the language model by itself; None for what is no part of it."""
    for pattern, replacement in KEY_MAPPING.items():
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name if _ALSO.match(name) else None


def component(name: str) -> str:
    """The part of a model to which a tensor belongs: `vision_tower` of `model.vision_tower.…`."""
    return name.removeprefix("model.").split(".")[0]
