"""Two FSDP2 workers against a plain loop in one process: the same losses and gradient norms, for many families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from lesa_ray.checkpoint.experts import expert_of
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.errors import UserError
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.freeze import freeze, trained_names
from lesa_ray.training.loop import Place, Trainer, make_optimizer
from lesa_ray.training.model import build, initialise, load, shard, stored_types, trained_parameters
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.workers import run_workers

FAMILIES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt2_bare",
    "gpt_neox",
    "pythia",
    "mixtral",
    "qwen3_moe",
)
UPPER = ("*.layers.3.*", "*.layers.4.*", "*.h.3.*", "*.h.4.*")
STEPS, BATCH, LENGTH = 3, 4, 24


def config_for(base: str, **settings: Any) -> TrainConfig:
    given = {"checkpoint": base, "data": "unused", "out": "unused", "batch": BATCH, "micro_batch": 1, "warmup": 0,
             "steps": STEPS, "precision": "fp32", "learning_rate": 1e-3, "clip": 0.5}  # fmt: skip
    return TrainConfig.model_validate({**given, **settings})


def rows(step: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(step).integers(0, families.VOCAB, (BATCH, LENGTH), dtype=np.int32)
    labels = ids.copy()
    labels[0, :11] = -100  # workers have unequal numbers of scored tokens
    return {"input_ids": ids, "labels": labels}


def chosen_of(base: str, chosen: str) -> tuple[str, ...]:
    return (chosen,) if chosen in ("all", "norms") else tuple(p for p in UPPER if (".h." in p) == ("gpt2" in base))


def plain_loop(base: str, chosen: str) -> list[tuple[float, float]]:
    """The reference: transformers' own loading, one process, whole batches."""
    config = config_for(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_cache=False).eval()
    names = trained_names(model, chosen_of(base, chosen), None, base)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    decay = [p for p in parameters.values() if p.ndim > 1]
    rest = [p for p in parameters.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    found = []
    for step in range(STEPS):
        batch = {name: torch.from_numpy(column).long() for name, column in rows(step).items()}
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


def sharded(base: str, chosen: str, **settings: Any) -> tuple[list[tuple[float, float]], int]:
    """The same by the trainer, on this worker; the bytes of the parameters that it holds."""
    config = config_for(base, **settings)
    checkpoint = open_checkpoint(base)
    workers, rank = dist.get_world_size(), dist.get_rank()
    model = build(checkpoint.config, base)
    names = trained_names(model, chosen_of(base, chosen), None, base)
    lowest = freeze(model, names)
    conversions = plan_conversions(model, checkpoint.tensors, base)
    stored = stored_types(checkpoint, conversions)
    shard(
        model, init_device_mesh("cpu", (workers,)), bf16=False, stored=stored, lowest=lowest,
        activation_checkpointing=config.activation_checkpointing, compiled=config.compile, cpu_offload=False,
    )  # fmt: skip
    load(model, checkpoint, conversions)
    trained = trained_parameters(model, names)
    place = Place(rank, workers, torch.device("cpu"))
    trainer = Trainer(model, trained, make_optimizer(trained, config), config, place, STEPS, LENGTH)
    found = []
    for step in range(STEPS):
        each = BATCH // workers
        own = {name: column[rank * each : (rank + 1) * each] for name, column in rows(step).items()}
        loss, norm = trainer.step(step, own)
        dist.all_reduce(loss)
        found.append((loss.item(), float(norm)))
    local = sum(parameter.to_local().nbytes for parameter in model.parameters())  # type: ignore[attr-defined]
    return found, local


def several(cases: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[list[tuple[float, float]], int]]:
    return [sharded(base, chosen, **settings) for base, chosen, settings in cases]


@pytest.mark.timeout(840)
def test_loss_and_gradient_norm_equal_a_plain_loops(bases: Callable[[str], str]) -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (bases(name), chosen, {}) for name in FAMILIES for chosen in ("all", "upper")
    ]
    cases += [(bases(name), chosen, {"activation_checkpointing": True})
              for name in ("llama", "llama_tied") for chosen in ("all", "upper")]  # fmt: skip
    found = run_workers(several, 2, cases)
    for number, (base, chosen, settings) in enumerate(cases):
        expected = plain_loop(base, chosen)
        for rank in range(2):
            values, local = found[rank][number]
            assert np.allclose(values, expected, rtol=1e-5, atol=0), (base, chosen, settings, values, expected)
            whole = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(base).parameters())
            assert local < 0.6 * whole


def filled(bases: list[str]) -> list[tuple[dict[str, np.ndarray], set[str]]]:
    """The rows of each parameter that this worker holds, by name, and the files' tensors of experts that it read."""
    found = []
    for base in bases:
        checkpoint = open_checkpoint(base)
        model = build(checkpoint.config, base)
        conversions = plan_conversions(model, checkpoint.tensors, base)
        freeze(model, tuple(name for name, _ in model.named_parameters()))
        shard(
            model, init_device_mesh("cpu", (dist.get_world_size(),)), bf16=False, stored={}, lowest=None,
            activation_checkpointing=False, compiled=False, cpu_offload=False,
        )  # fmt: skip
        seen: set[str] = set()

        class Watched(Checkpoint):
            def read(self, name: str, seen: set[str] = seen) -> torch.Tensor:
                seen.add(name)
                return super().read(name)

        load(model, Watched(**vars(checkpoint)), conversions)
        rows = {name: p.detach().to_local().numpy() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
        found.append((rows, {name for name in seen if ".experts." in name}))
    return found


@pytest.mark.timeout(450)
@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_reads_its_own_experts(workers: int, bases: Callable[[str], str]) -> None:
    """Of four experts three workers have two, two and none."""
    names = ("mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next")
    found = run_workers(filled, workers, [bases(name) for name in names])
    for at, name in enumerate(names):
        parts = [found[rank][at] for rank in range(workers)]
        for parameter, whole in AutoModelForCausalLM.from_pretrained(bases(name)).named_parameters():
            mine = np.concatenate([rows[parameter] for rows, _ in parts])
            assert np.array_equal(mine, whole.detach().float().numpy()), (name, parameter)
        experts = 8 if name == "deepseek_v3" else 4
        each = -(-experts // workers)
        for rank, (_, read) in enumerate(parts):
            assert {expert_of(tensor) for tensor in read} == set(range(experts)[rank * each : (rank + 1) * each])


def test_frozen_weights_beside_trained_ones_are_kept_as_stored(tmp_path: Path) -> None:
    for name in ("llama_tied", "mixtral"):  # the latter's experts are several tensors of the files
        families.make(name, tmp_path / name, dtype=torch.bfloat16)
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (str(tmp_path / "llama_tied"), "norms", {}),
        (str(tmp_path / "llama_tied"), "norms", {"activation_checkpointing": True}),
        (str(tmp_path / "mixtral"), "norms", {}),
    ]
    found = run_workers(several, 2, cases)
    for number, (base, chosen, _) in enumerate(cases):
        expected = plain_loop(base, chosen)
        norms, rest = [0], [0]
        for name, parameter in AutoModelForCausalLM.from_pretrained(base).named_parameters():
            (norms if "norm" in name else rest).append(parameter.numel())
        for rank in range(2):
            values, local = found[rank][number]
            assert np.allclose(values, expected, rtol=1e-5, atol=0), (base, values, expected)
            assert local == (4 * sum(norms) + 2 * sum(rest)) / 2


def fresh_weights(architecture: dict[str, Any], workers_expected: int) -> dict[str, np.ndarray]:
    assert dist.get_world_size() == workers_expected
    model = build(architecture, "test")
    shard(
        model, init_device_mesh("cpu", (workers_expected,)), bf16=False, stored={}, lowest=None,
        activation_checkpointing=False, compiled=False, cpu_offload=False,
    )  # fmt: skip
    initialise(model, architecture, seed=7)
    return {name: p.full_tensor().detach().numpy() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


def test_initial_weights_do_not_depend_on_the_number_of_workers(bases: Callable[[str], str]) -> None:
    architecture = open_checkpoint(bases("llama_tied")).config
    one = run_workers(fresh_weights, 1, architecture, 1)[0]
    two = run_workers(fresh_weights, 2, architecture, 2)[0]
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name], two[name]), name
    matrix = one["model.layers.1.mlp.gate_proj.weight"]
    assert abs(matrix.std() / 0.02 - 1) < 0.05
    out = one["model.layers.1.mlp.down_proj.weight"]
    assert abs(out.std() / (0.02 / np.sqrt(2 * families.LAYERS)) - 1) < 0.05
    assert not np.array_equal(one["model.layers.1.mlp.gate_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])
    assert (one["model.norm.weight"] == 1).all()


def test_a_checkpoint_of_another_model_is_refused(bases: Callable[[str], str]) -> None:
    llama, gpt2 = open_checkpoint(bases("llama")), open_checkpoint(bases("gpt2"))
    with pytest.raises(UserError, match=r"lacks 48 of the 48 tensors of LlamaForCausalLM"):
        plan_conversions(build(llama.config, "test"), gpt2.tensors, "test")
    wider = build({**llama.config, "intermediate_size": 128}, "test")
    with pytest.raises(UserError, match=r"mlp.down_proj.weight is \[64, 96\] in the files, .* makes it \[64, 128"):
        plan_conversions(wider, llama.tensors, "test")
    with pytest.raises(UserError, match="does not know the family 'nonsense'"):
        build({"model_type": "nonsense"}, "test")
    with pytest.raises(UserError, match=r"test: config\.json: transformers refuses it"):
        build({**llama.config, "hidden_size": 30}, "test")
