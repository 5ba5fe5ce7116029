"""What memory a unit may take: its GPU's, and the budget that was given beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lesa_ray import ExpandConfig, cli
from lesa_ray.errors import UserError
from lesa_ray.expansion.cluster_spec import ClusterSpec
from lesa_ray.expansion.estimate import estimate
from lesa_ray.expansion.lesa_task import task_here
from lesa_ray.expansion.method import Job, RunContext
from lesa_ray.expansion.prepare import prepare
from lesa_ray.gpu import CONTEXT_BYTES, gpu_memory
from lesa_ray.lesa.cost import unit_cost
from lesa_ray.lesa.rates import GPU_MEMORY
from lesa_ray.scratch import SCRATCH_VARIABLE, scratch_dir

Bases = Callable[[str], str]
MIB = 2**20


def test_a_unit_has_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what CUDA itself takes there, or half of it at most."""
    total = 80 * 10**9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=total))
    found = [gpu_memory(share) for share in (None, 1, 0.25, 0.01)]
    assert found == [total - CONTEXT_BYTES, total - CONTEXT_BYTES, total // 4 - CONTEXT_BYTES, total // 200]


def test_scratch_is_in_the_folder_that_the_machine_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SCRATCH_VARIABLE, raising=False)
    assert scratch_dir() == tempfile.gettempdir()
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path))
    assert scratch_dir() == str(tmp_path)
    told = CliRunner().invoke(cli.app, ["expand", "--help"], env={"COLUMNS": "400"})
    assert SCRATCH_VARIABLE in told.output


class _Reached(Exception):
    pass


def _reached(*given: Any, **named: Any) -> Any:
    raise _Reached


def _job(base: str, out: Path, **settings: Any) -> Job:
    return prepare(ExpandConfig.model_validate({"base": base, "out": str(out), **settings})).job


@pytest.mark.parametrize("method", ["lesa", "aligned-lesa"])
def test_a_budget_is_for_what_the_gpu_has_no_room_for(
    method: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: Any = SimpleNamespace(read=_reached, kept=_reached)
    monkeypatch.setattr("lesa_ray.lesa.fit.fit_each", _reached)
    job = _job(bases("llama"), tmp_path / "out", method=method)
    unit = next(unit for unit in job.method.units(job) if unit.name == "mlp.gate_proj.weight")
    large = RunContext(device="cuda", device_memory=10**9)
    small = replace(large, device_memory=1000)
    types = job.method.fitted(job, unit)
    beside, all_of_it = (unit_cost(task_here(job, types, context)).host_memory for context in (large, small))
    assert beside < all_of_it
    budget = (beside + all_of_it) // 2
    job = replace(job, config=job.config.model_copy(update={"memory_budget": budget}))
    with pytest.raises(UserError, match=r"--memory-budget [\d.]+ [kM]B: mlp\.gate_proj\.weight needs"):
        job.method.run(unit, job, tensors, small)
    with pytest.raises(_Reached):
        job.method.run(unit, job, tensors, large)


def test_transport_plans_go_to_a_gpu_with_room_for_them(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def fuse(*given: Any, device: str, **named: Any) -> Any:
        seen.append(device)
        raise _Reached

    monkeypatch.setattr("lesa_ray.expansion.transport.fuse_layer", fuse)
    monkeypatch.setattr("lesa_ray.expansion.methods.opt_deus.fits_device", lambda nbytes, device: nbytes < 10**9)
    job = _job(bases("llama"), tmp_path / "out", method="opt-deus")
    (unit, *_) = job.method.units(job)
    assert unit.device_memory >= 40 * 96**2  # five matrices of doubles, for 96 neurons
    large = RunContext(device="cuda", device_memory=2 * unit.device_memory)
    small = replace(large, device_memory=unit.device_memory)
    tight = replace(job, config=job.config.model_copy(update={"memory_budget": unit.memory - 1}))
    for given, context in ((job, RunContext()), (job, small), (job, large), (tight, large)):
        with pytest.raises(_Reached):
            job.method.run(unit, given, SimpleNamespace(), context)  # type: ignore[arg-type]
    assert seen == ["cpu", "cpu", "cuda", "cuda"]
    with pytest.raises(UserError, match=r"opt-deus, to align two layers, needs [\d.]+ [kM]B"):
        job.method.run(unit, tight, SimpleNamespace(), small)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="opt-deus, to align two layers, needs"
    ):  # no GPU to look for: said before anything is started
        _job(bases("llama"), tmp_path / "out", method="opt-deus", memory_budget=unit.memory - 1, gpus_per_task=0)


def test_transport_plans_are_reckoned_where_they_lie(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ClusterSpec(cpus_per_node=16, memory_per_node="256GB", gpus_per_node=2, gpu="h100")
    expansion = prepare(ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="opt-deus"))
    unit, on_gpu = expansion.units[0], estimate(expansion, cluster).units[0]
    assert on_gpu.device_memory == unit.device_memory
    monkeypatch.setitem(GPU_MEMORY, "h100", unit.device_memory)
    beside = estimate(expansion, cluster).units[0]
    assert beside.device_memory == 0
    assert beside.host_memory - on_gpu.host_memory == unit.device_memory
    assert beside.seconds["compute"] > on_gpu.seconds["compute"]
