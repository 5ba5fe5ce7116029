"""Small layer-wise scaled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.miniature import shake
from lesa_ray.layerwise.folder import write_code
from lesa_ray.layerwise.settings import LayerwiseConfig, architecture
from lesa_ray.training.model import build

SMALL: dict[str, Any] = {
    "profile": "crown", "layers": 5, "d_model": 64, "head_dim": 8, "kv_heads": 2, "vocab_size": 128, "seq_len": 64,
    "multiple": 8, "beta": "0.5,3,0.5", "alpha": "0.25,1,0.25",
}  # fmt: skip


def small_architecture(**changes: Any) -> dict[str, Any]:
    """config.json of a model whose layers all differ from their neighbours."""
    return architecture(LayerwiseConfig.model_validate({"out": "unused", **SMALL, **changes}))


def random_model(raw: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """The model with random weights, on the CPU in float32."""
    config = build(raw, "here").config
    config.use_cache = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        shake(model)
    return model.eval()


def write_checkpoint(folder: Path, raw: dict[str, Any], model: PreTrainedModel | None = None) -> str:
    """A checkpoint as an export leaves it, by default of random weights."""
    (model or random_model(raw)).save_pretrained(folder)
    Storage(str(folder)).write("config.json", json.dumps({**raw, "dtype": "float32"}).encode())
    write_code(Storage(str(folder)), raw)
    return str(folder)


def loaded(folder: str) -> PreTrainedModel:
    """A checkpoint, asserting that its names and shapes are exactly the model's; in eval mode."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    ready: PreTrainedModel = model.eval()
    return ready
