"""What is asked of a cluster: the arithmetic of machines, and the demand that waits where there is no room."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import ray
import torch
from pydantic import ValidationError
from ray._private.state import actors

from lesa_ray import ExpandConfig
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.distributed import cluster
from lesa_ray.distributed.cluster import Share, await_room, share_of_task, telling_of_waits
from lesa_ray.errors import MachineError, UnsharedError
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.machines import Machines, told
from lesa_ray.training.train_settings import TrainConfig
from tests.waiting import until

MIXED = Machines.of([{"CPU": 64.0, "memory": 100e9}, *2 * [{"CPU": 8.0, "GPU": 1.0, "memory": 50e9}]])


def test_bundles_fit_on_one_machine_each() -> None:
    assert MIXED.room({"GPU": 1, "CPU": 4}) == 2
    assert MIXED.room({"GPU": 2, "CPU": 4}) == 0  # there are two, on two machines
    assert MIXED.room({"GPU": 0.25, "CPU": 1}) == 8
    assert MIXED.room({"GPU": 0.1}) == 20  # 1 // 0.1 is 9
    assert MIXED.room({"GPU": 0, "CPU": 8}) == 10
    assert MIXED.having({"GPU": 1}).most("CPU") == 8
    assert (MIXED.gpus_each(None), MIXED.gpus_each(0.5), MIXED.gpus_each(None, "cpu")) == (1, 0.5, 0)
    none = Machines(())
    assert (none.gpus_each(None), none.gpus_each(None, "cuda"), none.room({"CPU": 1}), none.most("CPU")) == (0, 1, 0, 0)


def test_a_bundle_in_words() -> None:
    assert told({"GPU": 1, "CPU": 4}) == "1 GPU and 4 CPUs"
    assert told({"GPU": 0.0, "CPU": 1, "memory": 2e9}) == "1 CPU and 2.0 GB of memory"
    assert told({"GPU": 0.5, "CPU": 2, "memory": 1.5e9}) == "0.5 GPUs, 2 CPUs and 1.5 GB of memory"


def asking() -> list[str]:
    """States of the actors that ask for machines."""
    return [one["State"] for one in actors().values() if one["ActorClassName"] == "_Nothing"]


def test_what_there_is_no_room_for_is_asked_for_until_there_is(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor for each bundle waits, which is what an autoscaler looks at, and is gone afterwards."""
    heard: list[str] = []
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.2)
    bundle = {"CPU": 1.0, "GPU": 2.0, "memory": 0.0}
    there = await_room(lambda there: asking().count("PENDING_CREATION") == 2, bundle, 2, 20.0, heard.append)
    assert there.most("CPU") == 4
    assert heard[0].startswith("waiting up to 20 s for machines with 2 × 2 GPUs and 1 CPU to join the cluster")
    until(lambda: set(asking()) <= {"DEAD"})


def test_that_no_machine_is_left_is_told_while_ray_waits(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.1)
    small, large = {"CPU": 1.0}, {"CPU": 5.0}
    with telling_of_waits(small, heard.append, lambda: False), telling_of_waits(large, heard.append, lambda: False):
        until(lambda: len(heard) > 1)
    assert set(heard) == {"no machine of the cluster has 5 CPUs now; waiting for one to join"}


def test_room_that_others_have_is_told_until_the_work_begins(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "CROWDED_SECONDS", 0.5)
    heard: list[str] = []
    begun = threading.Event()

    class Busy:
        pass

    with telling_of_waits({"CPU": 1.0}, heard.append, begun.is_set):
        others = ray.remote(num_cpus=4)(Busy).remote()
        until(lambda: len(heard) > 1)
        assert set(heard) == {"waiting for room: others use the cluster's machines"}
        begun.set()
        time.sleep(0.5)  # for a look that had begun
        said = len(heard)
        time.sleep(1.0)
        assert len(heard) == said, "what is busy may be so with the work itself"
    ray.kill(others)


def test_what_is_asked_for_goes_with_who_asks(local_ray: None) -> None:
    """A stage of a fleet that is cancelled, or loses its machine, leaves no claim on machines that come later."""

    def wait() -> None:
        await_room(lambda there: False, {"CPU": 1.0, "GPU": 2.0}, 1, 300.0, lambda text: None)

    asker = ray.remote(num_cpus=0, max_retries=0)(wait).remote()
    until(lambda: "PENDING_CREATION" in asking())
    ray.cancel(asker, force=True)
    until(lambda: set(asking()) <= {"DEAD"})


def test_a_gpu_that_pytorch_does_not_see_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not done without: work for a GPU would take days on a core."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    share = Share(1.0, torch.get_num_threads(), 10**9)
    with pytest.raises(UnsharedError, match=r"^the machine \S+ has a GPU that PyTorch .* give --gpus-per-task 0$"):
        share.begin()
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert share.begin() == "cpu"


@pytest.mark.timeout(360)
def test_a_task_with_a_gpu_has_a_process_of_its_own() -> None:
    """A process sees the GPU that it saw first for good, and keeps what it had of it."""
    script = """
import os
import ray
from lesa_ray.distributed.tasks import Tasks
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
def work():
    return os.getpid()
for gpus in (1, 0):
    with Tasks(work) as tasks:
        for key in range(4):
            tasks.start(key, "task", num_cpus=1, num_gpus=gpus)
        found = []
        while tasks:
            found += [pid for _, pid in tasks.ended()]
    print("PROCESSES", len(set(found)))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, timeout=330, check=False
    )
    with_gpu, without = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PROCESSES")]
    assert with_gpu == 4, done.stderr[-2000:]
    assert without <= 3


def test_where_there_is_room_nothing_is_asked_for(local_ray: None) -> None:
    def tell(text: str) -> None:
        raise AssertionError(text)

    share = share_of_task("a unit", 3, gpus=None, cpus=None, tell=tell, seconds=9.0)
    assert (share.gpus, share.cpus) == (0, 1)
    assert share.options(10**6) == {"num_cpus": 1, "num_gpus": 0, "memory": 10**6}


def test_a_machine_that_does_not_come(local_ray: None) -> None:
    """No GPU: a fault that may be over next time. Less memory than a budget says: the unit runs with what there is."""
    heard: list[str] = []
    with pytest.raises(
        MachineError, match=r"a unit asks for 1 GPU and 1 CPU: no machine .* after 2 s of waiting .*0 GPUs, 4 CPUs"
    ):
        share_of_task("a unit", 1, gpus=1.0, cpus=1, tell=heard.append, seconds=2.0)
    share = share_of_task("a unit", 1, gpus=0.0, cpus=1, tell=heard.append, memory=10**15, seconds=2.0)
    assert "1000000.0 GB of memory" in heard[-1]
    assert 0 < share.options(10**15)["memory"] < 10**14
    with pytest.raises(
        MachineError, match=r"a piece asks for 1 GPU and 1 CPU: no machine of this cluster has that \(the"
    ):
        share_of_task("a piece", 1, gpus=1.0, cpus=1, tell=heard.append)  # this Ray is embedded: no wait
    assert len(heard) == 2


def test_cores_are_those_of_machines_with_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "machines", lambda: MIXED)
    heard: list[str] = []

    def share(tasks: int, **more: Any) -> Share:
        return share_of_task(
            "a unit", tasks, **{"gpus": None, "cpus": None, "tell": heard.append, "seconds": 0.0, **more}
        )

    assert share(1) == Share(1, 8, 45_000_000_000)
    assert share(4) == Share(1, 4, 45_000_000_000)
    assert share(1, gpus=0.0) == Share(0, 64, 90_000_000_000)
    assert share(1, device="cpu") == Share(0, 64, 90_000_000_000)
    with pytest.raises(MachineError, match="asks for 2 GPUs and 1 CPU"):
        share(1, gpus=2.0)
    with pytest.raises(MachineError, match="asks for 1 GPU and 16 CPUs"):
        share(1, cpus=16)


@pytest.mark.parametrize("gpus", [1.5, 2, -1])
def test_what_computes_on_one_gpu_asks_for_no_more(gpus: float) -> None:
    with pytest.raises(ValidationError, match="computes on one GPU" if gpus > 0 else "greater than or equal to 0"):
        ExpandConfig(base="b", out="o", gpus_per_task=gpus)


@pytest.mark.parametrize("gpus", [1.5, 2.25, -1])
def test_gpus_as_ray_gives_them(gpus: float) -> None:
    for make in (
        lambda: EvaluateConfig(checkpoints=("c",), data=("d",), gpus_per_task=gpus),
        lambda: AnalyzeConfig(base="b", gpus_per_task=gpus),
        lambda: TrainConfig(checkpoint="c", data="d", out="o", gpus_per_worker=gpus),
    ):
        with pytest.raises(ValidationError, match="whole number" if gpus > 0 else "greater than or equal to 0"):
            make()


def test_workers_do_not_share_a_gpu() -> None:
    alone = TrainConfig(checkpoint="c", data="d", out="o", gpus_per_worker=0.5)
    assert alone.gpus_per_worker == 0.5
    for workers in (2, (1, 2)):
        with pytest.raises(ValidationError, match=r"gpus_per_worker 0.5: 2 workers cannot share a GPU"):
            TrainConfig(checkpoint="c", data="d", out="o", gpus_per_worker=0.5, workers=workers)
