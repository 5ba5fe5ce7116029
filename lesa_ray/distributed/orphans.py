"""Machines that Ray holds for workers which are no more.

Ray Train's controller takes the room for its workers by a placement group, and Ray gives that back when the actor that
asked for it and the job have both ended. Where the controller was killed, for want of memory or with the machine that
led it, the job goes on, and so does the group: Ray even moves it to machines that join later, and those who wait for
room wait for ever. Ray Train has an actor that looks after this, but only from when the workers have started, and only
where Ray has a dashboard.
"""

from __future__ import annotations

import logging

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)
_CONTROLLER = "TrainController"


def give_back_room() -> None:
    """Remove the placement groups of this job's controllers that have ended: of this process's and of others, such as
    a fleet's stage that was lost and is led from here now."""
    try:
        orphans = _orphans(ray.get_runtime_context().get_job_id())
    except Exception as error:  # parts of Ray that may change; a run that lost no controller does not need them
        log.debug("what Ray holds for lost workers cannot be seen: %r", error)
        return
    for group in orphans:
        remove_placement_group(group)


def _orphans(job: str) -> list[PlacementGroup]:
    """Groups of a job's controllers that have ended. What Ray shows in public does not name who asked for a group."""
    from ray._private.state import actors, state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    found = []
    for stored in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(stored)
        gone = group.state == PlacementGroupTableData.REMOVED
        if gone or not group.creator_actor_dead or group.creator_job_id.hex() != job:
            continue
        if actors(group.creator_actor_id.hex()).get("ActorClassName") == _CONTROLLER:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found
