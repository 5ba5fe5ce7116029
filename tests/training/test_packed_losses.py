"""Packed conversations: training on them equals training on each alone, and architectures that mix them up are
refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.errors import UserError
from lesa_ray.training import packing_check
from lesa_ray.training.batches import worker_share
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.loop import Place, Trainer
from lesa_ray.training.model import build, load, shard, stored_types, trained_parameters
from lesa_ray.training.packing import fill_rows, hide
from lesa_ray.training.packing_check import check_packing
from lesa_ray.training.run import prepare
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.blocks import make_chat_blocks
from tests.training.workers import run_workers

Bases = Callable[[str], str]
SEQ_LEN = 32
LENGTHS = ((11, 9, 8), (32,), (5, 20, 7), (17, 6))
"""Conversations of each row: with padding, one alone, full."""
FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "qwen3_moe")


def conversations(seed: int = 0) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Ids of each conversation of each row, and which are answers."""
    draw = np.random.default_rng(seed)
    return [
        [(draw.integers(0, families.VOCAB, n, dtype=np.int32), draw.random(n) < 0.6) for n in row] for row in LENGTHS
    ]


def packed(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> dict[str, np.ndarray]:
    return fill_rows([[hide(ids, scored) for ids, scored in row] for row in rows], SEQ_LEN, pad=0)


def config_for(base: str, **settings: Any) -> TrainConfig:
    given = {"checkpoint": base, "data": "unused", "out": "unused", "batch": len(LENGTHS), "micro_batch": 2, "steps": 1,
             "precision": "fp32", "clip": 1e9}  # fmt: skip
    return TrainConfig.model_validate({**given, **settings})


class Recorder(torch.optim.SGD):
    """Keeps the gradient instead of a step."""

    gradient: torch.Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [p.grad.full_tensor() for group in self.param_groups for p in group["params"]]  # type: ignore[union-attr]
        self.gradient = torch.cat([grad.flatten() for grad in grads])


def trainer(base: str, *, bf16: bool = False, **settings: Any) -> tuple[Trainer, Recorder]:
    config, checkpoint = config_for(base, **settings), open_checkpoint(base)
    workers = dist.get_world_size()
    model = build(checkpoint.config, base)
    conversions = plan_conversions(model, checkpoint.tensors, base)
    shard(
        model, init_device_mesh("cpu", (workers,)), bf16=bf16, stored=stored_types(checkpoint, conversions),
        lowest=None, activation_checkpointing=config.activation_checkpointing, compiled=config.compile,
        cpu_offload=False,
    )  # fmt: skip
    load(model, checkpoint, conversions)
    trained = trained_parameters(model, [name for name, _ in model.named_parameters()])
    recorder = Recorder(trained.values(), lr=0.0)
    return Trainer(
        model, trained, recorder, config, Place(dist.get_rank(), workers, torch.device("cpu")), 1, SEQ_LEN
    ), (recorder)


def by_trainer(bases: list[str]) -> list[tuple[float, torch.Tensor]]:
    """Loss and gradient of a packed batch, on this worker."""
    found = []
    for base in bases:
        made, recorder = trainer(base)
        own, _ = worker_share(np.arange(len(LENGTHS)), dist.get_rank(), dist.get_world_size())
        loss, _ = made.step(0, {name: column[own] for name, column in packed(conversations()).items()})
        dist.all_reduce(loss)
        found.append((loss.item(), recorder.gradient))
    return found


def one_by_one(base: str) -> tuple[float, torch.Tensor]:
    """The reference: each conversation alone through transformers' own model, the answers' losses added up."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    examples = [example for row in conversations() for example in row]
    count = sum(int(scored[1:].sum()) for _, scored in examples)
    total = torch.zeros((), dtype=torch.float64)
    for ids, scored in examples:
        logits = model(torch.from_numpy(ids[None]).long()).logits[0, :-1]
        answers = torch.from_numpy(scored[1:])
        loss = torch.nn.functional.cross_entropy(
            logits[answers], torch.from_numpy(ids[1:]).long()[answers], reduction="sum"
        )
        (loss / count).backward()
        total += loss.detach() / count
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.timeout(720)
def test_a_packed_batch_gives_the_loss_and_gradient_of_each_conversation_alone(bases: Bases) -> None:
    folders = [bases(name) for name in FAMILIES]
    one, two = (run_workers(by_trainer, workers, folders) for workers in (1, 2))
    for number, base in enumerate(folders):
        loss, gradient = one_by_one(base)
        for found_loss, found in (one[0][number], two[0][number], two[1][number]):
            assert found_loss == pytest.approx(loss, rel=5e-6), base
            assert float((found - gradient).norm() / gradient.norm()) < 5e-6, base


def losses_of_the_second(base: str, modes: list[dict[str, Any]]) -> list[list[float]]:
    """For each mode: the loss of each row's second conversation, with its neighbours one way and another."""
    found = []
    for mode in modes:
        made, _ = trainer(base, **mode)
        assert made.model.training
        values = []
        for shift in (0, 1, 50):
            rows = [
                [(ids if i == 1 else (ids + shift) % families.VOCAB, scored & (i == 1)) for i, (ids, scored) in
                 enumerate(row)]
                for row in conversations()
            ]  # fmt: skip
            columns = packed(rows)
            columns["input_ids"][0, 28:] = shift  # the padding
            loss = made.losses(columns)
            loss.backward()
            values.append(loss.item())
        found.append(values)
    return found


@pytest.mark.timeout(720)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_neighbours_do_not_count_in_any_mode_of_training(name: str, bases: Bases) -> None:
    modes = [{}, {"bf16": True}, {"activation_checkpointing": True}]
    if name == "llama":
        modes += [{"bf16": True, "activation_checkpointing": True, "compile": True}]
    (found,) = run_workers(losses_of_the_second, 1, bases(name), modes)
    for mode, values in zip(modes, found, strict=True):
        assert values == [pytest.approx(values[0], rel=5e-6)] * 3, mode


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "bert"])
def test_families_that_keep_conversations_apart_pass(name: str, bases: Bases) -> None:
    content = open_checkpoint(bases(name)).config
    state = torch.random.get_rng_state()
    check_packing(content, name, families.POSITIONS)
    assert torch.equal(torch.random.get_rng_state(), state)


def wide(family: str, **settings: Any) -> dict[str, Any]:
    """config.json as released models have it."""
    content: dict[str, Any] = AutoConfig.for_model(family, **settings).to_dict()
    return content


@pytest.mark.timeout(360)
@pytest.mark.parametrize(
    "content",
    [
        wide("opt"),  # hands the mask no positions
        wide("gpt_oss"),
        wide("mamba"),  # recurrent
        wide("lfm2", layer_types=["full_attention"] * 2 + ["conv"] * 30),  # a convolution reaches back, in layer 2
    ],
    ids=lambda content: content["model_type"],
)
def test_families_that_mix_them_up_are_refused(content: dict[str, Any]) -> None:
    family = content["model_type"]
    with pytest.raises(UserError, match=f"^it: transformers' {family} does not keep conversations packed into one row"):
        check_packing(content, "it", 64)


@pytest.mark.parametrize("lost", ["always", "with several rows", "the third"])
def test_the_check_notices_when_transformers_stops_parting_them(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = masking_utils.find_packed_sequence_indices

    def find(position_ids: torch.Tensor) -> torch.Tensor | None:
        if lost == "always" or (lost == "with several rows" and len(position_ids) > 1):
            return None
        found = original(position_ids)
        return None if found is None else found.clamp(max=1)  # the third conversation sees the second

    packing_check._difference.cache_clear()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", find)
    try:
        with pytest.raises(UserError, match="does not keep conversations"):
            check_packing(wide("llama"), "it", 64)
    finally:
        packing_check._difference.cache_clear()


def test_long_rope_is_refused_only_where_it_changes() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 10000.0,
               "original_max_position_embeddings": 4096}  # fmt: skip
    content = wide("phi3", max_position_embeddings=131072, rope_parameters=scaling, pad_token_id=0)
    check_packing(content, "it", 4096)
    with pytest.raises(UserError, match=r"it: phi3 takes other rotary frequencies .* make them with --seq-len 4096$"):
        check_packing(content, "it", 8192)


def test_a_run_on_conversations_is_checked_before_it_begins(bases: Bases, tmp_path: Path) -> None:
    data = make_chat_blocks(str(tmp_path / "data"), packed(conversations()))
    given = {"data": data, "out": str(tmp_path / "out"), "train": ("all",), "batch": 2, "steps": 1}
    run = prepare(TrainConfig.model_validate({**given, "checkpoint": bases("llama")}), gpus=False)
    assert run.blocks.kind == "chat"
    small = wide("opt", vocab_size=128, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                 word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**small)).save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="transformers' opt does not keep conversations"):
        prepare(TrainConfig.model_validate({**given, "checkpoint": str(tmp_path / "opt")}), gpus=False)
