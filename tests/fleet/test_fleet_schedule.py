"""Which stages begin: what they ask for, the largest first, small ones in the gaps, never none for good."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lesa_ray.config import ExpandConfig, Settings
from lesa_ray.distributed.fleet import _told_from
from lesa_ray.errors import UserError
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.fleet.schedule import choose, demand, total_of
from lesa_ray.fleet.settings import Amount
from lesa_ray.machines import Machines
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.train_settings import TrainConfig

CPUS = Machines.of([{"CPU": 4.0}, {"CPU": 8.0}])
GPUS = Machines.of([*CPUS.nodes, {"CPU": 32.0, "GPU": 8.0}])


def train(**more: Any) -> TrainConfig:
    return TrainConfig(checkpoint="c", data="d", out="o", **more)


@pytest.mark.parametrize(
    ("settings", "on_cpus", "on_gpus"),
    [
        (TokenizeConfig(data=("d",), tokenizer="t", out="o"), (1, 0), (1, 0)),
        (ExpandConfig(base="b", out="o", cpus_per_task=2), (2, 0), (2, 1)),
        (ExpandConfig(base="b", out="o", gpus_per_task=0.25), (1, 0.25), (1, 0.25)),
        (train(workers=4), (12, 0), (4, 4)),
        (train(workers=(2, 4), cpus_per_worker=3), (6, 0), (6, 2)),
        (train(workers=4, gpus_per_worker=0, cpus_per_worker=1), (4, 0), (4, 0)),
        (EvaluateConfig(checkpoints=("c",), data=("d",)), (8, 0), (32, 1)),
        (EvaluateConfig(checkpoints=("c",), data=("d",), cpus_per_task=2, device="cpu"), (2, 0), (2, 0)),
    ],
)
def test_what_a_stage_is_reckoned_to_take(settings: Settings, on_cpus: Any, on_gpus: Any) -> None:
    assert demand(settings, CPUS) == Amount(cpus=on_cpus[0], gpus=on_cpus[1])
    assert demand(settings, GPUS) == Amount(cpus=on_gpus[0], gpus=on_gpus[1])


def chosen(ready: dict[str, tuple[float, float]], running: list[Amount], total: Amount, at_once: int = 8) -> str:
    amounts = {name: Amount(cpus=cpus, gpus=gpus) for name, (cpus, gpus) in ready.items()}
    return "".join(choose(list(ready), lambda name: amounts[name], running, total, at_once))


def test_the_largest_first_and_small_ones_in_the_gaps() -> None:
    total = Amount(cpus=16, gpus=8)
    ready = {"a": (1.0, 0.0), "b": (4.0, 4.0), "c": (8.0, 8.0), "d": (2.0, 2.0), "e": (20.0, 0.0)}
    assert chosen(ready, [], total) == "ca"
    assert chosen(ready, [Amount(cpus=2, gpus=2)], total) == "bda"
    assert chosen(ready, [Amount(cpus=2, gpus=2)], total, at_once=3) == "bd"
    assert chosen(ready, [Amount(cpus=16, gpus=0)], total) == ""


def test_what_is_larger_than_the_cluster_begins_when_nothing_runs() -> None:
    """Ray knows better: the cluster may grow, or the stage ends with one line that says what it lacks."""
    total = Amount(cpus=4)
    assert chosen({"a": (4.0, 8.0), "b": (1.0, 0.0)}, [], total) == "ab"[:1]
    assert chosen({"a": (4.0, 8.0)}, [Amount(cpus=1)], total) == ""
    assert chosen({"b": (1.0, 0.0)}, [Amount(cpus=1)], total) == "b"


def test_the_budget_is_what_the_cluster_has_or_is_said_to_grow_to() -> None:
    assert total_of(GPUS, None) == Amount(cpus=44, gpus=8)
    assert total_of(GPUS, Amount(cpus=256, gpus=32)) == Amount(cpus=256, gpus=32)


def test_what_another_machine_finds_wrong_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "1", "NodeManagerHostname": "head"}, {"NodeID": "2", "NodeManagerHostname": "gpu-7"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "1"))
    error = UserError("BASE /b: no such folder")
    told = [_told_from(node, error) for node in ("1", "2", None)]
    assert told == [str(error), f"{error} (found on the machine gpu-7)", str(error)]
