"""What a training run says of a fault that ended a round."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from lesa_ray.distributed import rounds
from lesa_ray.distributed.cluster import check_here
from lesa_ray.distributed.room_for_workers import Resources, wait_for_room
from lesa_ray.distributed.rounds import _cause, train_in_rounds
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.training.run import Run, gpus_before
from lesa_ray.training.train_settings import TrainConfig


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gpus", [1.0, 0.0])
def test_workers_get_again_what_they_had(
    gpus: float, local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever machines are left: those with GPUs may be gone for a while."""
    ends, asked = iter([RuntimeError("a machine was lost"), None]), list[float | None]()
    had = Resources(1, 1, 1, gpus)

    def wait(config: TrainConfig, listener: Listener, *, again: bool) -> Resources:
        assert again
        asked.append(config.gpus_per_worker)
        return had

    monkeypatch.setattr(rounds, "_round", lambda *_: next(ends))
    monkeypatch.setattr(rounds, "wait_for_room", wait)
    config = TrainConfig(checkpoint="c", data="d", out=str(tmp_path))
    run = cast(Run, SimpleNamespace(config=config, steps=3))
    train_in_rounds(run, had, Silent())
    assert asked == [gpus]


@pytest.mark.timeout(120)
def test_where_the_machine_itself_is_lost_nothing_more_is_asked_of_ray(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Some calls would end the process without a word."""
    nodes = ray.nodes()
    check_here("go on")
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Alive": False} for node in nodes])
    with pytest.raises(MachineError, match=r"\(raylet\) was killed, or does not answer; go on$"):
        check_here("go on")

    def called(*_: object, **__: object) -> None:
        pytest.fail("asked")

    monkeypatch.setattr(rounds, "_round", lambda *_: RuntimeError("all workers were lost"))
    monkeypatch.setattr(rounds, "_raise_failure", called)
    monkeypatch.setattr(rounds, "wait_for_room", called)
    run = cast(Run, SimpleNamespace(config=TrainConfig(checkpoint="c", data="d", out=str(tmp_path)), steps=3))
    with pytest.raises(MachineError, match=r"\(raylet\).*; the same command goes on from the last checkpoint$"):
        train_in_rounds(run, Resources(1, 1, 1, 0), Silent())


@pytest.mark.timeout(120)
def test_room_that_was_there_and_is_no_more_is_a_fault(local_ray: None, tmp_path: Path) -> None:
    config = TrainConfig(checkpoint="c", data="d", out=str(tmp_path), workers=64, cpus_per_worker=1)
    with pytest.raises(UserError, match=r"^workers 64 of 1 CPU each: the cluster can give 4; ask for fewer"):
        wait_for_room(config, Silent())
    with pytest.raises(MachineError, match=r"can give 4 by now; the same command goes on from the last checkpoint, al"):
        wait_for_room(config, Silent(), again=True)


@pytest.mark.parametrize(
    ("record", "asked", "expected"),
    [
        (None, None, None),
        ({"gpus_per_worker": 1.0}, None, 1.0),
        ({"gpus_per_worker": 1.0}, 0, 0),
        ({"gpus_per_worker": 0.5}, None, 1.0),  # a part was asked for then
        ({"gpus_per_worker": 0.0}, None, None),  # begun on CPUs, it may go on on GPUs
        ({"bf16": True}, None, None),  # of an older version
    ],
)
def test_a_run_that_goes_on_later_does_too(
    record: dict[str, Any] | None, asked: float | None, expected: float | None, tmp_path: Path
) -> None:
    (tmp_path / "training").mkdir()
    if record is not None:
        (tmp_path / "training" / "run.json").write_text(json.dumps(record))
    config = TrainConfig(checkpoint="c", data="d", out=str(tmp_path), gpus_per_worker=asked)
    assert gpus_before(config) == expected


@pytest.mark.timeout(60)
def test_a_worker_that_was_lost_is_the_cause_of_what_the_others_say(local_ray: None) -> None:
    class Worker:
        def process(self) -> int:
            return os.getpid()

    worker = ray.remote(num_cpus=0)(Worker).remote()
    os.kill(ray.get(worker.process.remote()), signal.SIGKILL)
    with pytest.raises(ActorDiedError) as died:
        ray.get(worker.process.remote())
    other = RuntimeError("gloo: Connection closed by peer")
    lost = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(\n", died.value)
    said = _cause(WorkerGroupError("", {0: other, 1: lost}))
    assert said.startswith("worker 1 was lost: ")
    assert "actor_id" not in said
    assert "died" in said
    assert _cause(WorkerGroupError("", {0: other})) == "RuntimeError: gloo: Connection closed by peer"
    led = _cause(died.value)
    assert led.startswith("the process that leads the workers was lost: ")
    assert "actor_id" not in led
