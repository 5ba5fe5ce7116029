"""What the architecture is called in config.json, for whoever must know without importing transformers."""

from __future__ import annotations

MODEL_TYPE = "layerwise_llama"
MODEL_CLASS = "LayerwiseLlamaForCausalLM"
CODE_FILES = ("configuration_layerwise_llama.py", "modeling_layerwise_llama.py")
"""Copied beside a checkpoint, so that it loads where this package is not."""
AUTO_MAP = {
    "AutoConfig": "configuration_layerwise_llama.LayerwiseLlamaConfig",
    "AutoModel": "modeling_layerwise_llama.LayerwiseLlamaModel",
    "AutoModelForCausalLM": f"modeling_layerwise_llama.{MODEL_CLASS}",
}
