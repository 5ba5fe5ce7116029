"""Llama with layers that differ in FFN width and heads, built from transformers' own parts.

Only the sizes of a layer's matrices differ; what is computed is Llama's code, so the KV cache, attention kernels,
activation checkpointing, FSDP and compile work as they do there, and where all layers are alike the logits are Llama's
to the last bit. Parameters have Llama's names. Two settings make it compute what Qwen2 and Qwen3 do, whose code is
Llama's but for attention: `qkv_bias` (Qwen2's biases) and `qk_norm` (Qwen3's attention in place of Llama's).

Self-contained: see configuration_layerwise_llama.py."""

from __future__ import annotations

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_layerwise_llama import LayerwiseLlamaConfig


class LayerwiseLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's layer with the sizes of one layer."""

    def __init__(self, config: LayerwiseLlamaConfig, layer_idx: int) -> None:
        own = config.of_layer(layer_idx)
        own.attention_bias = config.attention_bias or config.qkv_bias
        super().__init__(own, layer_idx)
        if config.qk_norm:
            self.self_attn = Qwen3Attention(own, layer_idx)
        if not config.attention_bias:
            self.self_attn.o_proj.bias = None
        # the model's own from here on: which attention is used may be changed there later
        self.self_attn.config = config
        self.mlp.config = config


class LayerwiseLlamaPreTrainedModel(LlamaPreTrainedModel):  # type: ignore[misc]
    config_class = LayerwiseLlamaConfig
    _no_split_modules = ("LayerwiseLlamaDecoderLayer",)


class LayerwiseLlamaModel(LlamaModel):  # type: ignore[misc]
    """Llama's stack of layers. Its constructor is not called: it would make all layers alike."""

    config_class = LayerwiseLlamaConfig
    _no_split_modules = ("LayerwiseLlamaDecoderLayer",)
    _can_record_outputs = {  # noqa: RUF012  transformers reads it off the class
        "hidden_states": LayerwiseLlamaDecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
    }

    def __init__(self, config: LayerwiseLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LayerwiseLlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LayerwiseLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The stack with a head over the vocabulary."""

    config_class = LayerwiseLlamaConfig
    _no_split_modules = ("LayerwiseLlamaDecoderLayer",)

    def __init__(self, config: LayerwiseLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LayerwiseLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
