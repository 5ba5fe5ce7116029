"""Settings of a layer-wise scaled model, and what follows from them: its sizes, its config.json.

Beside the lists with one value for each layer config.json has Llama's own keys, for tools that read those: the heads of
a whole layer, the widest FFN, the most KV heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lesa_ray.config import Recipe, Settings, numbers
from lesa_ray.errors import UserError
from lesa_ray.layerwise.budget import MULTIPLES, Frame, Sizes, Solved, solve
from lesa_ray.layerwise.names import AUTO_MAP, MODEL_CLASS, MODEL_TYPE
from lesa_ray.layerwise.profiles import PRESETS, PROFILES, Preset, Profile, ProfileName

_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", re.IGNORECASE)
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_NOT_OF_A_PRESET = ("profile", "layers", "params", "d_model", "head_dim", "kv_heads", "alpha", "beta", "multiple")


def _count(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r}: give a number such as 180M, 1.5B or 180000000")
    return round(float(match[1]) * _COUNTS[match[2].upper()])


Count = Annotated[int, BeforeValidator(_count), Field(ge=1)]
"""A pydantic field of so many parameters: 180M is 180 million."""


class LayerwiseConfig(Settings):
    """One configuration: a profile with its sizes and budget, or a preset."""

    out: str
    """Where config.json and the model's code go: a new folder or an fsspec URL."""
    profile: ProfileName = "vanilla"
    """How widths and heads go from the bottom to the top."""
    preset: str | None = None
    """One of the paper's models instead (arXiv 2509.06518): isotropic-12, isotropic-18, vanilla-18, framed-18,
    reverse-18, crown-18."""
    recipe: Recipe = "released-code"
    """preset: KV heads as in the paper's text (four) or in its code (a third of the query heads). The parameter counts
    it publishes are the code's."""
    layers: int = Field(default=18, ge=1)
    """Decoder layers."""
    params: Count | None = None
    """Parameters in all, e.g. 180M, met within 0.5 % by scaling FFN widths. By default what the profile's own
    widths give."""
    d_model: int = Field(default=768, ge=1)
    """Width of the residual stream."""
    head_dim: int = Field(default=64, ge=2)
    """Width of a head."""
    kv_heads: int = Field(default=4, ge=1)
    """KV heads of every layer; query heads are multiples of it."""
    beta: tuple[float, ...] | None = None
    """FFN width over d_model: bottom,top or bottom,middle,top; before it is scaled. By default the profile's own."""
    alpha: tuple[float, ...] | None = None
    """Query heads over d_model / head_dim, likewise."""
    multiple: int | None = Field(default=None, ge=1)
    """What FFN widths are multiples of. By default the largest of 256, 128, 64 … that meets the budget."""
    vocab_size: int = Field(default=50_304, ge=1)
    """Entries of the vocabulary."""
    seq_len: int = Field(default=1024, ge=1)
    """Tokens of the longest sequence."""
    tied: bool = False
    """One matrix for embedding and head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies (Llama 2's; the paper's code 500,000)."""
    eos_token_id: int | None = Field(default=None, ge=0)
    """The token that ends a text, at which generation stops."""

    @field_validator("alpha", "beta", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        return numbers(value)

    @model_validator(mode="before")
    @classmethod
    def _preset_decides(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") is not None:
            if data["preset"] not in PRESETS:
                raise ValueError(f"preset {data['preset']}: unknown; there are {', '.join(PRESETS)}")
            if also := [name for name in _NOT_OF_A_PRESET if data.get(name) is not None]:
                raise ValueError(f"preset {data['preset']} decides {also[0]}; leave one of the two out")
        elif isinstance(data, dict) and data.get("recipe") is not None:
            raise ValueError("recipe: says which of a preset's two variants is meant; give a preset")
        return data

    @model_validator(mode="after")
    def _ends_with_a_token(self) -> LayerwiseConfig:
        if self.eos_token_id is not None and self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id}: the vocabulary has {self.vocab_size} entries, from 0")
        return self

    @property
    def shape(self) -> Profile:
        """The profile with the multipliers that were given."""
        named = PROFILES[self.profile]
        return Profile(self.beta or named.beta, self.alpha or named.alpha, named.framed)


def sizes_of(config: LayerwiseConfig) -> Solved:
    """Sizes of the model. Raises: UserError for a budget that cannot be met, or sizes that make no model."""
    if config.preset is not None:
        return _of_preset(PRESETS[config.preset], config)
    frame = Frame(
        profile=config.shape,
        layers=config.layers,
        d_model=config.d_model,
        head_dim=config.head_dim,
        kv_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        tied=config.tied,
    )
    return solve(frame, config.params, config.multiple)


def with_one_multiple(models: Sequence[LayerwiseConfig]) -> list[LayerwiseConfig]:
    """The models with one multiple of their FFN widths, the largest with which all meet their budgets.

    Raises: UserError if there is none, for the model that fails with the smallest."""
    for multiple in MULTIPLES:
        found = [model.model_copy(update={"multiple": multiple}) for model in models]
        try:
            for model in found:
                sizes_of(model)
        except UserError as error:
            failure = UserError(f"{model.layers} layers, {model.profile}: {error}")
        else:
            return found
    raise failure


def _of_preset(preset: Preset, config: LayerwiseConfig) -> Solved:
    heads, kv_heads = preset.heads(config.recipe)
    sizes = Sizes(
        d_model=preset.d_model,
        head_dim=preset.head_dim,
        vocab_size=config.vocab_size,
        tied=config.tied,
        widths=tuple(preset.widths()),
        heads=tuple(heads),
        kv_heads=tuple(kv_heads),
    )
    return Solved(sizes, 1.0, preset.multiple)


def architecture(config: LayerwiseConfig) -> dict[str, Any]:
    """The model's config.json. Raises: UserError."""
    sizes = sizes_of(config).sizes
    return {
        "architectures": [MODEL_CLASS],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.layers,
        "intermediate_sizes": list(sizes.widths),
        "num_attention_heads_per_layer": list(sizes.heads),
        "num_key_value_heads_per_layer": list(sizes.kv_heads),
        "intermediate_size": max(sizes.widths),
        "num_attention_heads": sizes.d_model // sizes.head_dim,
        "num_key_value_heads": max(sizes.kv_heads),
        "max_position_embeddings": config.seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": None,
    }
