"""New layers that come in behind gates: what a gate is at each step, the model it makes, and a run from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from lesa_ray.checkpoint.manifest import read_manifest
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.export import export_checkpoint
from lesa_ray.errors import UserError
from lesa_ray.expansion.runner import Silent
from lesa_ray.training import checkpoints
from lesa_ray.training.conversion import plan_conversions
from lesa_ray.training.finish import finish_run, trained_result
from lesa_ray.training.freeze import freeze, trained_names
from lesa_ray.training.gates import Gates
from lesa_ray.training.insertion import Insertion, plan_insertion, ramp_steps
from lesa_ray.training.loop import Place, Trainer, make_optimizer
from lesa_ray.training.model import build, layers_of, load, shard, stored_types, trained_parameters
from lesa_ray.training.run import prepare
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.blocks import make_blocks
from tests.training.metric_rows import read_metrics
from tests.training.test_model import BATCH, LENGTH, STEPS, config_for, rows
from tests.training.workers import run_all, run_workers

Grow = Callable[..., Any]
Bases = Callable[[str], str]
CPU = torch.device("cpu")
RAMP = 2
"""Of the three steps that are compared with a plain loop: gates of 1/2, 1 and 1."""


@pytest.mark.parametrize(
    ("order", "at"),
    [
        ("together", {0: (0, 0, 0), 1: (1 / 6,) * 3, 3: (0.5,) * 3, 5: (5 / 6,) * 3, 6: (1, 1, 1), 9: (1, 1, 1)}),
        ("bottom", {0: (0, 0, 0), 1: (0.5, 0, 0), 2: (1, 0, 0), 3: (1, 0.5, 0), 5: (1, 1, 0.5), 6: (1, 1, 1)}),
        ("top", {0: (0, 0, 0), 1: (0, 0, 0.5), 3: (0, 0.5, 1), 5: (0.5, 1, 1), 6: (1, 1, 1), 9: (1, 1, 1)}),
    ],
)
def test_gates_are_a_function_of_the_step(order: Any, at: dict[int, tuple[float, ...]]) -> None:
    insertion = Insertion((2, 5, 6), 6, order)
    for done, gates in at.items():
        assert insertion.gates(done) == pytest.approx(gates, abs=1e-15)
        assert insertion.share(done) == pytest.approx(sum(gates) / 3)
    awkward = Insertion((1, 2, 3), 7, order)  # which three layers do not divide
    assert awkward.gates(7) == (1, 1, 1)
    assert awkward.share(6) < 1
    for earlier, later in zip(map(awkward.gates, range(7)), map(awkward.gates, range(1, 8)), strict=True):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))


def config(**given: Any) -> TrainConfig:
    return TrainConfig.model_validate({"checkpoint": "grown", "data": "d", "out": "o", **given})


def test_the_ramp_is_a_share_of_the_steps() -> None:
    assert [ramp_steps(config(insert_over=0.3), steps) for steps in (1, 10, 1000)] == [1, 3, 300]
    assert ramp_steps(config(), 1000) == 0
    assert plan_insertion(config(), None, 10, "x") is None


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"^insert_over 0\.3: checkpoint b has no expansion\.json .*; leave ins"):
        plan_insertion(config(insert_over=0.3), None, 10, "checkpoint b")
    none: Any = {"new_layers": []}
    with pytest.raises(UserError, match=r"^insert_over 1: checkpoint b has no new layer; leave insert_over out$"):
        plan_insertion(config(insert_over=1), none, 10, "checkpoint b")
    with pytest.raises(ValueError, match="insert_order top: layers are in at once; give insert_over too"):
        config(insert_order="top")
    with pytest.raises(ValueError, match="insert_over: from scratch no layer is new"):
        config(checkpoint=None, architecture="a", insert_over=0.5)


def test_what_a_run_is_does_not_depend_on_settings_that_are_off() -> None:
    """Runs that were begun before there were these settings go on."""
    assert {"insert_over", "insert_order"} <= config().not_counted
    assert not {"insert_over", "insert_order"} & config(insert_over=0.1).not_counted


@pytest.mark.parametrize(("family", "method"), [("llama", "copy"), ("gpt2", "solar")])
def test_shut_it_is_the_base_and_open_the_ordinary_model(family: str, method: str, bases: Bases, grow: Grow) -> None:
    grown = grow(bases(family), method=method, factor=1.4).out
    manifest = read_manifest(Storage(grown))
    assert manifest is not None
    ids = torch.arange(24).view(2, 12)

    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(ids, use_cache=False).logits
        return found

    base, ordinary, model = (AutoModelForCausalLM.from_pretrained(url).eval() for url in (bases(family), grown, grown))
    gates = Gates(layers_of(model), Insertion(tuple(manifest["new_layers"]), 4, "together"), CPU)
    assert torch.equal(logits(model), logits(base))
    gates.set(1)
    assert not torch.allclose(logits(model), logits(base), atol=1e-3)
    gates.set(4)
    assert torch.equal(logits(model), logits(ordinary))
    assert gates.are_open(4)
    assert not gates.are_open(3)
    assert model.state_dict().keys() == ordinary.state_dict().keys()


class Branch(nn.Module):
    """A layer as older ones are: called by name, its output a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return hidden_states + self.inner(hidden_states), "weights"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gates_move_without_compiling_again_and_layers_may_return_tuples(device: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [Branch().to(device), Branch().to(device)]
    gates = Gates(layers, Insertion((0, 1), 4, "bottom"), torch.device(device))
    for layer in layers:
        layer.compile(backend="eager")
    x = torch.randn(2, 3, device=device, requires_grad=True)
    graphs = []
    for done, (first, second) in enumerate([(0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1)]):
        gates.set(done)
        middle, kept = layers[0](hidden_states=x)
        (out, _) = layers[1](hidden_states=middle)
        expected = x + first * layers[0].inner(x)
        expected = expected + second * layers[1].inner(expected)
        assert torch.allclose(out, expected, atol=1e-6)
        assert kept == "weights"
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0


def gated_forward(model: Any, layer: int, gate: list[float]) -> None:
    """The formula, written over a layer's own forward."""
    own = layers_of(model)[layer].forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = own(x, *args, **kwargs)
        return x + gate[0] * (out - x)

    layers_of(model)[layer].forward = forward  # type: ignore[method-assign]


def plain_loop(grown: str, chosen: str) -> list[tuple[float, float]]:
    """The reference: transformers' own model, one process, whole batches, AdamW as published."""
    manifest = read_manifest(Storage(grown))
    assert manifest is not None
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32, use_cache=False).eval()
    names = trained_names(model, [chosen], manifest, grown)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    gate = [0.0]
    for layer in manifest["new_layers"]:
        gated_forward(model, layer, gate)
    decay, rest = ([p for p in parameters.values() if (p.ndim > 1) is wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    found = []
    for step in range(STEPS):
        gate[0] = min(1.0, (step + 1) / RAMP)
        batch = {name: torch.from_numpy(column).long() for name, column in rows(step).items()}
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


def sharded(grown: str, chosen: str, activation_checkpointing: bool) -> list[tuple[float, float]]:
    """The same by the trainer, on this worker."""
    settings = config_for(grown, insert_over=RAMP / STEPS)
    checkpoint, manifest = open_checkpoint(grown), read_manifest(Storage(grown))
    workers, rank = dist.get_world_size(), dist.get_rank()
    model = build(checkpoint.config, grown)
    names = trained_names(model, [chosen], manifest, grown)
    lowest = freeze(model, names)
    insertion = plan_insertion(settings, manifest, STEPS, grown)
    assert insertion is not None
    gates = Gates(layers_of(model), insertion, CPU)
    conversions = plan_conversions(model, checkpoint.tensors, grown)
    shard(
        model, init_device_mesh("cpu", (workers,)), bf16=False, stored=stored_types(checkpoint, conversions),
        lowest=lowest, activation_checkpointing=activation_checkpointing, compiled=False, cpu_offload=False,
    )  # fmt: skip
    load(model, checkpoint, conversions)
    trained = trained_parameters(model, names)
    place = Place(rank, workers, CPU)
    trainer = Trainer(model, trained, make_optimizer(trained, settings), settings, place, STEPS, LENGTH, gates=gates)
    found = []
    for step in range(STEPS):
        each = BATCH // workers
        loss, norm = trainer.step(step, {n: c[rank * each : (rank + 1) * each] for n, c in rows(step).items()})
        dist.all_reduce(loss)
        found.append((loss.item(), float(norm)))
    return found


def several(cases: list[tuple[str, str, bool]]) -> list[list[tuple[float, float]]]:
    return [sharded(*case) for case in cases]


@pytest.mark.timeout(450)
def test_loss_and_gradient_norm_equal_a_plain_loops(bases: Bases, grow: Grow) -> None:
    """Copies come in: frozen old layers, everything trained, activations made anew, a mixture of experts."""
    grown = {name: grow(bases(name), method="copy", factor=1.4).out for name in ("llama_tied", "gpt2", "mixtral")}
    cases = [
        (grown["llama_tied"], "new", False),
        (grown["llama_tied"], "all", True),
        (grown["gpt2"], "all", False),
        (grown["mixtral"], "new", True),
    ]
    found = run_workers(several, 2, cases)
    for number, case in enumerate(cases):
        expected = plain_loop(*case[:2])
        assert min(norm for _, norm in expected) > 0
        for rank in range(2):
            assert np.allclose(found[rank][number], expected, rtol=1e-5, atol=0), (case, found[rank][number], expected)


@pytest.mark.timeout(450)
def test_a_run_that_is_cut_short_goes_on_and_its_ramp_is_not_exported(bases: Bases, grow: Grow, tmp_path: Path) -> None:
    grown = grow(bases("llama"), method="copy", factor=1.4).out
    out = str(tmp_path / "run")
    settings = {
        "checkpoint": grown, "data": make_blocks(str(tmp_path / "blocks"), rows=24), "out": out, "steps": 6, "batch": 4,
        "precision": "fp32", "checkpoint_every": 2, "eval_every": 2, "log_every": 2, "keep": 9, "insert_over": 0.6,
        "insert_order": "bottom",
    }  # fmt: skip
    run_workers(run_all, 1, settings)
    told = read_metrics(out)
    heldout = {row["step"]: (row["heldout_loss"], row["inserted"]) for row in told if "heldout_loss" in row}
    assert {step: share for step, (_, share) in heldout.items()} == {0: 0.0, 2: 0.5, 4: 1.0, 6: 1.0}
    assert [row["inserted"] for row in told if "loss" in row] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    base = AutoModelForCausalLM.from_pretrained(bases("llama")).eval()
    ids = torch.from_numpy(prepare(TrainConfig.model_validate(settings), gpus=False).blocks.heldout.read(range(8))
                           ["input_ids"].astype(np.int64))  # fmt: skip
    with torch.no_grad():
        loss = float(base(ids, labels=ids).loss)
    assert heldout[0][0] == pytest.approx(loss, rel=1e-6), "before the first step it is the base"

    run = prepare(TrainConfig.model_validate(settings), gpus=False)
    records = checkpoints.find_complete(out, run.identity)
    assert [(record.step, record.heldout_loss is None) for record in records] == [(2, True), (4, False), (6, False)]
    with pytest.raises(UserError, match=r"at step 2 new layers were 50 % inserted; .*; export one of step 4 or later"):
        export_checkpoint(out, str(tmp_path / "early"), "2")
    assert not (tmp_path / "early").exists()
    export_checkpoint(out, str(tmp_path / "late"), "4")
    assert "over the first 4 steps, one after another from the bottom" in (tmp_path / "late" / "README.md").read_text()
    assert families.load_strict(tmp_path / "late", "llama").config.num_hidden_layers == 7

    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / checkpoints.FOLDER / checkpoints.folder_name(step))
    run_workers(run_all, 1, settings)
    again = read_metrics(out)
    same = ("step", "loss", "gradient_norm", "heldout_loss", "inserted")
    assert [[row.get(name) for name in same] for row in again] == [[row.get(name) for name in same] for row in told]
    finish_run(run, Silent())
    result = trained_result(run)
    assert (result.inserted_over, result.heldout_before) == (4, heldout[0][0])
    assert "insert" not in json.dumps(open_checkpoint(out).config)
