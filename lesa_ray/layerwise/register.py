"""Make the architecture known to transformers' Auto classes in this process.

Checkpoints bring its code along, but the package never runs code that lies beside a checkpoint: it uses its own."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """`AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `layerwise_llama` from here on."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from lesa_ray.layerwise.configuration_layerwise_llama import LayerwiseLlamaConfig
    from lesa_ray.layerwise.modeling_layerwise_llama import LayerwiseLlamaForCausalLM, LayerwiseLlamaModel

    AutoConfig.register(LayerwiseLlamaConfig.model_type, LayerwiseLlamaConfig)
    AutoModel.register(LayerwiseLlamaConfig, LayerwiseLlamaModel)
    AutoModelForCausalLM.register(LayerwiseLlamaConfig, LayerwiseLlamaForCausalLM)
