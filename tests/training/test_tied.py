"""A head beside a tied embedding: the embedding again, or another matrix, which training would lose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lesa_ray import UserError
from lesa_ray.training.run import prepare
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.blocks import make_blocks

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def base_with_head(folder: Path, head: torch.Tensor | None) -> str:
    base = families.make("llama_tied", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone() if head is None else head}, file, {"format": "pt"})
    return base


def settings(base: str, tmp_path: Path) -> TrainConfig:
    data = make_blocks(str(tmp_path / "blocks"))
    given = {"checkpoint": base, "data": data, "out": str(tmp_path / "out"), "train": "all", "steps": 2, "batch": 4}
    return TrainConfig.model_validate(given)


def test_an_embedding_that_the_files_hold_twice_is_trained_as_one(tmp_path: Path) -> None:
    run = prepare(settings(base_with_head(tmp_path / "base", None), tmp_path), gpus=False)
    assert EMBEDDING in run.trained
    assert HEAD not in run.trained


def test_a_head_of_its_own_is_refused_until_config_says_so(tmp_path: Path) -> None:
    head = torch.randn(families.VOCAB, 64, generator=torch.Generator().manual_seed(0))
    base = base_with_head(tmp_path / "base", head)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(loaded.lm_head.weight, head)  # what is evaluated and served
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    config = settings(base, tmp_path)
    message = f"ties {HEAD} to {EMBEDDING}, but the files hold two"
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(config, gpus=False)
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    assert {HEAD, EMBEDDING} <= set(prepare(config, gpus=False).trained)


def test_a_head_in_another_dtype_is_another(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "same")
    embedding = load_file(tmp_path / "same/model.safetensors")[EMBEDDING]
    base = base_with_head(tmp_path / "base", embedding.half())
    with pytest.raises(UserError, match="two different matrices"):
        prepare(settings(base, tmp_path), gpus=False)
