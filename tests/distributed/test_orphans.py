"""What a controller that was killed still holds, and what others hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup, remove_placement_group

from lesa_ray.distributed import rounds
from lesa_ray.distributed.cluster import free
from lesa_ray.distributed.orphans import give_back_room
from lesa_ray.distributed.room_for_workers import Resources
from lesa_ray.expansion.runner import Silent
from tests.waiting import until


def holding() -> tuple[Any, Any]:
    """Actors that take room, the first as Ray Train's controller does. Pickled as they are: a worker need not
    find this module."""

    class TrainController:
        def take(self, cpus: float) -> str:
            group: Any = placement_group([{"CPU": cpus}])
            ray.get(group.ready())
            return str(group.id.hex())

    class Holder(TrainController):
        pass

    TrainController.__qualname__ = "TrainController"  # Ray's name of it
    return ray.remote(num_cpus=0)(TrainController), ray.remote(num_cpus=0)(Holder)


@pytest.mark.timeout(120)
def test_room_of_a_controller_that_was_killed_is_given_back(local_ray: None) -> None:
    def held() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] == "CREATED"}

    controller, holder = holding()
    killed, alive, other = controller.remote(), controller.remote(), holder.remote()
    groups = ray.get([actor.take.remote(1.0) for actor in (killed, alive, other)])
    ray.kill(killed)
    ray.kill(other)

    def only_its_own() -> bool:
        give_back_room()
        return held() == set(groups[1:])

    until(only_its_own, 30)
    for group in groups[1:]:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


@pytest.mark.timeout(120)
def test_a_round_has_the_room_of_one_whose_controller_was_killed(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = holding()[0].remote()
    until(lambda: free().most("CPU") == 4, 30)
    ray.get(killed.take.remote(4.0), timeout=30)
    ray.kill(killed)
    until(lambda: actors(killed._actor_id.hex())["State"] == "DEAD", 30)
    until(lambda: not free().most("CPU"), 30)
    monkeypatch.setattr(rounds, "_round", lambda *_: until(lambda: free().most("CPU") == 4, 30) and None)
    run: Any = SimpleNamespace(config=SimpleNamespace(retries=0, out=str(tmp_path)), steps=1)
    rounds.train_in_rounds(run, Resources(1, 1, 4, 0.0), Silent())
