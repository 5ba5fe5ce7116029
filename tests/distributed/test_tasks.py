"""Tasks side by side: what one that fails does to the others, and what no work depends on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from lesa_ray.distributed import cluster
from lesa_ray.distributed import tasks as tasks_module
from lesa_ray.distributed.tasks import Tasks, result_of
from lesa_ray.ending import ending
from lesa_ray.errors import FullError, MachineError, UserError
from lesa_ray.faults import is_fault
from tests.waiting import until

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]


def started(tasks: Tasks[str], folder: Path, failure: Exception) -> None:
    """One that fails once the second has begun, that second one, which ends when it may, and one that has to wait.

    failure: of a kind that Ray does not try again."""
    tasks.start("fails", "fails", str(folder), "fails", failure, num_cpus=1)
    tasks.start("runs", "runs", str(folder), "runs", None, num_cpus=1)
    until((folder / "runs").exists)
    tasks.start("waits", "waits", str(folder), "waits", None, num_cpus=4)


def call() -> Any:
    """Pickled as it is: a worker need not find this module."""

    def work(folder: str, name: str, failure: Exception | None) -> str:
        Path(folder, name).touch()
        while not Path(folder, "runs" if failure else "go").exists():
            time.sleep(0.02)
        if failure:
            raise failure
        return name

    return work


def watched(tasks: Tasks[str], folder: Path) -> list[str]:
    """Which have ended when something is raised, and what; after a fault those that run may end."""
    ended = []
    try:
        while tasks:
            for key, _ in tasks.ended():
                ended.append(key)
            if tasks.fault is not None:
                (folder / "go").touch()
    except (OSError, UserError) as error:
        ended.append(str(error))
    return ended


def test_a_fault_ends_none_that_has_begun_and_begins_none(tmp_path: Path) -> None:
    with Tasks[str](call(), begun=lambda: {"fails", "runs"}) as tasks:
        started(tasks, tmp_path, OSError("the disk is full"))
        assert watched(tasks, tmp_path) == ["runs", "the disk is full"]
    assert not (tmp_path / "waits").exists()


@pytest.mark.parametrize("failure", [UserError("no number"), OSError("the disk is full")])
def test_wrong_input_ends_the_others_and_so_does_a_fault_where_nothing_would_stay(
    failure: Exception, tmp_path: Path
) -> None:
    begun = (lambda: {"fails", "runs"}) if isinstance(failure, UserError) else None
    with Tasks[str](call(), begun) as tasks:
        started(tasks, tmp_path, failure)
        assert watched(tasks, tmp_path) == [str(failure)]


def test_what_ray_lost_is_a_fault_and_what_a_task_raised_is_not() -> None:
    assert is_fault(ActorDiedError())
    assert is_fault(GetTimeoutError("slow"))
    assert ending(ActorDiedError()) is not None
    assert not is_fault(RayTaskError("work", "", AssertionError()))


def test_what_was_cancelled_is_gone_when_the_context_ends(tmp_path: Path) -> None:
    ticks = tmp_path / "ticks"

    def ticking() -> None:
        while True:
            with ticks.open("a") as file:
                file.write(".")

    with Tasks[int](ticking) as tasks:
        tasks.start(0, "ticking", num_cpus=0)
        until(ticks.exists)
    ended = ticks.stat().st_size
    time.sleep(0.5)
    assert ticks.stat().st_size == ended


def test_what_no_machine_has_any_more_is_told_of_waited_for_and_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own word is what waits: a task for which no machine has room looks like one that is about to begin."""
    monkeypatch.setattr(tasks_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(tasks_module, "GROW_SECONDS", 2.0)
    (tmp_path / "runs").touch()
    (tmp_path / "go").touch()
    with Tasks[str](call()) as tasks:
        tasks.start("waits", "unit waits", str(tmp_path), "waits", None, num_cpus=64)
        tasks.start("runs", "unit runs", str(tmp_path), "runs", None, num_cpus=0)
        ended, said = {}, ""
        while tasks:
            ended.update(tasks.ends())
            said = said or tasks.told("")
    assert said == "no machine of the cluster has 64 CPUs now; waiting for one to join"
    assert ended["runs"]() == "runs"
    with pytest.raises(MachineError, match="unit waits: no machine of the cluster has 64 CPUs now, and none"):
        ended["waits"]()


def test_room_that_others_have_is_waited_for_and_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks_module, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(tasks_module, "CROWDED_SECONDS", 1.0)
    (tmp_path / "go").touch()

    class Busy:
        pass

    others = ray.remote(num_cpus=4)(Busy).remote()
    until(lambda: not cluster.free().most("CPU"))
    waits = "waiting for room: others use the cluster's machines"
    with Tasks[str](call()) as tasks:
        tasks.start("waits", "unit waits", str(tmp_path), "waits", None, num_cpus=1)
        until(lambda: not list(tasks.ends()) and tasks.told("") == waits)
        assert tasks.told("waits: reading") == "waits: reading"
        assert tasks.told("") == "", "what there is was in use by the task itself a moment ago"
        ray.kill(others)
        ended = dict(watched_ends(tasks))
    assert ended["waits"]() == "waits"
    assert tasks.told("") == ""


def watched_ends(tasks: Tasks[str]) -> Iterator[tuple[str, Any]]:
    while tasks:
        yield from tasks.ends()


def test_a_full_gpu_is_told_of_at_once(tmp_path: Path) -> None:
    """Where other faults are tried three times more."""
    tried = {"full": FullError("unit full: the GPU's memory is full"), "faulty": MachineError("no answer")}

    def fail(folder: str, name: str, error: Exception) -> None:
        with Path(folder, name).open("a") as file:
            file.write("x")
        raise error

    with Tasks[str](fail) as tasks:
        for name, error in tried.items():
            tasks.start(name, name, str(tmp_path), name, error, num_cpus=1)
        ended = dict(watched_ends(tasks))
    for name, error in tried.items():
        with pytest.raises(type(error), match=str(error)):
            ended[name]()
    assert {name: len((tmp_path / name).read_text()) for name in tried} == {"full": 1, "faulty": 4}


def test_a_task_whose_worker_is_always_lost_is_a_fault() -> None:
    with pytest.raises(MachineError, match="lost after"):
        result_of(ray.remote(max_retries=0)(lambda: os._exit(1)).remote(), "unit b")
