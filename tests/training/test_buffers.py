"""Buffers: as transformers makes them in a new model, as a base's files hold them, and kept with what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.training import checkpoints
from lesa_ray.training.buffers import initial_buffers, persistent_buffers
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.export import export, plan_export
from lesa_ray.training.loop import make_optimizer
from lesa_ray.training.model import build, initialise, load, shard
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.workers import run_workers

SMALL = {
    "vocab_size": families.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **SMALL, "model_type": "deepseek_v3", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK,  # a router's correction bias, beside its weight
    "minimax_m2": {**SMALL, "model_type": "minimax_m2", "num_local_experts": 4, "head_dim": 16, "rotary_dim": 8},
    "apertus": {**SMALL, "model_type": "apertus"},  # constants of the activation, which only its constructor knows
    "falcon_h1": {**SMALL, "model_type": "falcon_h1", "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "mamba_chunk_size": 8},  # not persistent, filled by the module three above it
}  # fmt: skip
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
INSIDE = {"deepseek_v3": BIAS, "minimax_m2": "model.layers.1.mlp.e_score_correction_bias",
          "apertus": "model.layers.1.mlp.act_fn.beta", "falcon_h1": "model.layers.1.mamba.mup_vector"}  # fmt: skip


def sharded(architecture: dict[str, Any], cpu_offload: bool = False) -> PreTrainedModel:
    model = build(architecture, "test")
    shard(
        model, init_device_mesh("cpu", (dist.get_world_size(),)), bf16=False, stored={}, lowest=None,
        activation_checkpointing=False, compiled=False, cpu_offload=cpu_offload,
    )  # fmt: skip
    return model


def copies(buffers: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: buffer.numpy().copy() for name, buffer in buffers.items()}


def at_work(base: str, out: str) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray], float]:
    """New buffers of each architecture; those read from `base`; the bias that a checkpoint at `out` brought back."""
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    new = {name: copies(dict(sharded(content).named_buffers())) for name, content in ARCHITECTURES.items()}
    checkpoint = open_checkpoint(base)
    plan = plan_conversions(build(checkpoint.config, base), checkpoint.tensors, base)
    model = sharded(checkpoint.config, cpu_offload=True)
    load(model, checkpoint, plan)
    read = copies(persistent_buffers(model))

    model = sharded(DEEPSEEK)
    initialise(model, DEEPSEEK, seed=1)
    buffers = persistent_buffers(model)
    buffers[BIAS].fill_(0.3)
    config = TrainConfig.model_validate({"architecture": DEEPSEEK, "data": "unused", "out": out, "steps": 1})
    trained = dict(model.named_parameters())
    optimizer = make_optimizer(trained, config)
    checkpoints.init_optimizer_state(optimizer)
    saver = checkpoints.Saver(out, "identity", 1, dist.new_group(backend="gloo"), buffers)
    saver.save(1, 1, None, trained, optimizer)
    saver.wait()
    dist.barrier()  # rank 0 completes it
    buffers[BIAS].zero_()
    checkpoints.load(out, checkpoints.find_complete(out)[-1], trained, optimizer, buffers)
    return new, read, buffers[BIAS].mean().item()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buffers")


@pytest.fixture(scope="module")
def base(place: Path) -> str:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DEEPSEEK))
    model.get_buffer(BIAS).copy_(torch.arange(4) / 8)
    model.save_pretrained(place / "base")
    return str(place / "base")


@pytest.fixture(scope="module")
def done(base: str, place: Path) -> list[Any]:
    return run_workers(at_work, 2, base, str(place / "run"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_new_buffers_are_those_of_a_new_model_of_transformers(name: str, done: list[Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name]), dtype=torch.float32)
    expected = dict(model.named_buffers())
    assert INSIDE[name] in expected
    for new, _, _ in done:
        assert new[name].keys() == expected.keys()
        for buffer, value in new[name].items():
            assert np.array_equal(value, expected[buffer].numpy()), buffer


def test_they_are_read_from_a_base(done: list[Any]) -> None:
    for _, read, _ in done:
        assert read.keys() == {BIAS}
        assert read[BIAS].tolist() == [0, 0.125, 0.25, 0.375]


def test_without_a_base_they_are_saved_and_exported(done: list[Any], place: Path) -> None:
    assert [round(bias, 6) for _, _, bias in done] == [0.3, 0.3]
    state = str(place / "run" / checkpoints.FOLDER / checkpoints.folder_name(1))
    out = str(place / "exported")
    facts = {"data": "none", "steps": 1, "tokens": 1, "learning_rate": 1e-3, "heldout_loss": None}
    export(plan_export(None, state, out, config=DEEPSEEK), facts)
    stored = open_checkpoint(out)
    assert stored.tensors[BIAS].dtype == "F32"
    assert stored.tensors["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert model.get_buffer(BIAS).tolist() == pytest.approx([0.3] * 4)


def test_the_model_is_left_on_the_meta_device() -> None:
    model = build(DEEPSEEK, "test")
    assert initial_buffers(model)[BIAS].tolist() == [0] * 4
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
