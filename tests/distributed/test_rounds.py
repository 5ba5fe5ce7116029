"""What a training run says of a fault that ended a round."""

from __future__ import annotations

import os
import signal

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from lesa_ray.distributed.rounds import _cause


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
