"""Configuration of a Llama, or of a Qwen, whose layers differ in FFN width and heads.

Self-contained, as modeling_layerwise_llama.py is: both are copied beside a checkpoint, which then loads with
`trust_remote_code=True` wherever transformers 5 is. Nothing here may import the package it comes from."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig


class LayerwiseLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's configuration with a list for what may differ from layer to layer.

    intermediate_sizes, num_attention_heads_per_layer, num_key_value_heads_per_layer: one value for each layer; None:
    all layers have `intermediate_size`, `num_attention_heads`, `num_key_value_heads`.
    qkv_bias: queries, keys and values have biases, the output projection has none, as in Qwen2 (`attention_bias`: all
    four have). qk_norm: queries and keys are normed head by head, as in Qwen3.

    Raises: ValueError for a list of another length, or heads that KV heads do not divide."""

    model_type = "layerwise_llama"

    def __init__(
        self,
        intermediate_sizes: list[int] | None = None,
        num_attention_heads_per_layer: list[int] | None = None,
        num_key_value_heads_per_layer: list[int] | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        layers = self.num_hidden_layers
        self.intermediate_sizes = list(intermediate_sizes or [self.intermediate_size] * layers)
        self.num_attention_heads_per_layer = list(num_attention_heads_per_layer or [self.num_attention_heads] * layers)
        self.num_key_value_heads_per_layer = list(num_key_value_heads_per_layer or [self.num_key_value_heads] * layers)
        for name in ("intermediate_sizes", "num_attention_heads_per_layer", "num_key_value_heads_per_layer"):
            values = getattr(self, name)
            if len(values) != layers or not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(f"{name} = {values}: expected {layers} whole numbers above 0, one for each layer")
        pairs = zip(self.num_attention_heads_per_layer, self.num_key_value_heads_per_layer, strict=True)
        for layer, (heads, kv_heads) in enumerate(pairs):
            if heads % kv_heads:
                raise ValueError(f"layer {layer}: {kv_heads} KV heads do not divide its {heads} query heads")

    def of_layer(self, layer: int) -> LlamaConfig:
        """Llama's configuration of one layer."""
        config = copy.copy(self)
        config.intermediate_size = self.intermediate_sizes[layer]
        config.num_attention_heads = self.num_attention_heads_per_layer[layer]
        config.num_key_value_heads = self.num_key_value_heads_per_layer[layer]
        return config
