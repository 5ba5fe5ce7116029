"""Ways to run the same training, by real workers without Ray: where memory lies, compiled, in bf16, by any number of
workers. What is computed stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.training import checkpoints, worker
from lesa_ray.training.conversion import Conversion
from lesa_ray.training.model import load
from lesa_ray.training.run import prepare
from lesa_ray.training.train_settings import TrainConfig
from lesa_ray.training.trained_state import TrainedState
from lesa_ray.training.worker import set_up, train
from tests import families
from tests.training.blocks import make_blocks
from tests.training.metric_rows import read_metrics
from tests.training.workers import run_workers

Bases = Callable[[str], str]
Curve = list[tuple[float, float]]
CPU = torch.device("cpu")
UPPER = ("*.layers.3.*", "*.layers.4.*")


def settings(base: str, data: str, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint": base, "data": data, "out": str(out), "train": "all", "steps": 6, "batch": 4, "workers": (1, 3),
        "learning_rate": 3e-3, "precision": "fp32", "checkpoint_every": 3, "eval_every": 3, "log_every": 3, **more,
    }  # fmt: skip


def curves(cases: list[dict[str, Any]]) -> list[Curve]:
    """Loss and gradient norm of each step, for one run after another."""
    for case in cases:
        train(prepare(TrainConfig.model_validate(case), gpus=False), CPU, lambda progress: None)
        dist.barrier()
    return [
        [(row["loss"], row["gradient_norm"]) for row in read_metrics(case["out"]) if "loss" in row] for case in cases
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"), rows=24)


def types_of(case: dict[str, Any]) -> dict[str, tuple[torch.dtype, str]]:
    """Element type and device of what this worker keeps of each parameter, after a step."""
    trainer, _, _ = set_up(prepare(TrainConfig.model_validate(case), gpus=False), CPU, fresh=True)
    ids = np.arange(64, dtype=np.int32).reshape(2, 32)
    trainer.step(0, {"input_ids": ids, "labels": ids})
    return {name: (p.dtype, str(p.to_local().device)) for name, p in trainer.model.named_parameters()}


def options(cases: list[dict[str, Any]], typed: dict[str, Any]) -> tuple[list[Curve], dict[str, Any]]:
    return curves(cases), types_of(typed)


@pytest.mark.timeout(450)
def test_offloaded_or_in_bf16(bases: Bases, data: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    families.make("llama", base, dtype=torch.bfloat16)
    cases = [
        settings(str(base), data, tmp_path / "plain", train=UPPER),
        settings(str(base), data, tmp_path / "offload", train=UPPER, cpu_offload=True),
        settings(str(base), data, tmp_path / "bf16", train=UPPER, precision="bf16"),
        settings(str(base), data, tmp_path / "all", train=UPPER, precision="bf16", cpu_offload=True,
                 activation_checkpointing=True),
    ]  # fmt: skip
    (plain, offload, bf16, everything), types = run_workers(options, 2, cases, cases[2])[0]
    assert len(plain) == 6
    assert offload == plain
    losses = np.array([loss for loss, _ in plain])
    for half in (bf16, everything):
        found = np.array([loss for loss, _ in half])
        assert np.allclose(found, losses, rtol=0.02)
        assert not np.array_equal(found, losses), "it was not bf16"
    for name, (dtype, _) in types.items():
        trained = any(f".layers.{layer}." in name for layer in (3, 4))
        assert dtype is (torch.float32 if trained else torch.bfloat16), name
    state = TrainedState(str(tmp_path / "bf16" / checkpoints.FOLDER / "step-00000006"))
    name = "model.layers.3.mlp.up_proj.weight"
    assert state.shapes.keys() == {name for name in types if types[name][0] is torch.float32}
    assert state.read(name).dtype is torch.float32
    moved = (state.read(name) - open_checkpoint(str(base)).read(name).float()).abs()
    assert 0 < moved.mean() < 0.05


def resumed(cases: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, np.ndarray]]]:
    """Of each run when it is set up again: what it reads of the base, and the weights that it has then."""
    found = []
    for case in cases:
        run = prepare(TrainConfig.model_validate(case), gpus=False)
        train(run, CPU, lambda progress: None)
        read: list[str] = []

        def watched(model: Any, checkpoint: Checkpoint, conversions: Sequence[Conversion], read: Any = read) -> None:
            read += [name for conversion in conversions for name in conversion.targets]
            load(model, checkpoint, conversions)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "load", watched)
            trainer, step, _ = set_up(run, CPU)
        assert step == run.steps
        weights = {name: p.full_tensor().detach().numpy() for name, p in trainer.model.named_parameters()}  # type: ignore[attr-defined]
        found.append((read, weights))
    return found


@pytest.mark.timeout(360)
def test_a_run_that_goes_on_reads_of_the_base_what_it_does_not_train(bases: Bases, data: str, tmp_path: Path) -> None:
    once = {"steps": 1, "checkpoint_every": 1, "eval_every": 9, "log_every": 1}
    cases = [
        settings(bases("llama_tied"), data, tmp_path / "all", **once),
        settings(bases("mixtral"), data, tmp_path / "some", train=("*.mlp.experts.down_proj", "norms"), **once),
    ]
    found = run_workers(resumed, 1, cases)[0]
    for case, (read, weights) in zip(cases, found, strict=True):
        state = TrainedState(f"{case['out']}/{checkpoints.FOLDER}/step-00000001")
        assert sorted(read) == sorted(weights.keys() - state.shapes.keys())
        base = dict(AutoModelForCausalLM.from_pretrained(case["checkpoint"]).named_parameters())
        for name, values in weights.items():
            trained = name in state.shapes
            assert np.array_equal(values, (state.read(name) if trained else base[name].detach()).numpy()), name
    assert found[0][0] == []
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"} < set(found[1][0])


def test_what_is_made_together_with_something_frozen_is_read() -> None:
    plain, buffer = Conversion(("w",), ("w",), True), Conversion(("b",), ("b",), True)
    both, neither = Conversion(("qk",), ("q", "k"), False), Conversion(("e0", "e1"), ("e",), False)
    given = [plain, buffer, both, neither]
    assert worker._not_trained(given, {"w": 0, "q": 0, "e": 0}) == [buffer, both]
    assert worker._not_trained(given, ()) == given


def with_graphs(plain: dict[str, Any], compiled: dict[str, Any]) -> tuple[Curve, Curve, int, int]:
    """Both curves, and how many graphs the compiler had made after each."""
    from torch._dynamo.utils import counters

    one = curves([plain])[0]
    before = counters["stats"]["unique_graphs"]
    two = curves([compiled])[0]
    return one, two, before, counters["stats"]["unique_graphs"]


@pytest.mark.timeout(600)
def test_compiled(bases: Bases, data: str, tmp_path: Path) -> None:
    """About half a minute: the compiler's."""
    one = settings(bases("llama"), data, tmp_path / "plain", steps=3)
    two = settings(bases("llama"), data, tmp_path / "compiled", steps=3, compile=True)
    plain, compiled, none, graphs = run_workers(with_graphs, 2, one, two)[0]
    assert none == 0 < graphs
    assert len(plain) == 3
    assert np.allclose(plain, compiled, rtol=1e-5, atol=0)


@pytest.mark.timeout(450)
def test_a_batch_that_the_workers_cannot_divide(bases: Bases, data: str, tmp_path: Path) -> None:
    """Three workers and four rows: one has two rows, the others a row and a filler, which counts for nothing."""
    one = run_workers(curves, 1, [settings(bases("llama"), data, tmp_path / "one")])[0][0]
    three = run_workers(curves, 3, [settings(bases("llama"), data, tmp_path / "three", micro_batch=1)])[0][0]
    assert len(one) == 6
    assert np.allclose(one, three, rtol=1e-5, atol=0)
    heldout = [
        [row["heldout_loss"] for row in read_metrics(str(tmp_path / name)) if "heldout_loss" in row]
        for name in ("one", "three")
    ]
    assert len(heldout[0]) == 3
    assert np.allclose(*heldout, rtol=1e-5, atol=0)
