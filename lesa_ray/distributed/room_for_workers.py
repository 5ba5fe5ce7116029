"""How many workers a training run gets, and what each gets: of the machines there are, those yet to come, and what is
free on them now.

A range of workers is decided here and not by Ray Train, whose elastic mode ends a group that is at work whenever a
machine joins, a checkpoint or none, and reckons with whole machines, whoever else is using them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from lesa_ray.distributed.cluster import await_room, free, machines, may_grow
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Listener
from lesa_ray.machines import Machines, told
from lesa_ray.training.train_settings import TrainConfig

GOES_ON = "the same command goes on from the last checkpoint"
_JOIN_SECONDS = 60.0
"""Where machines are joining one after another: how long the next may take."""


@dataclass(frozen=True)
class Resources:
    """What a worker asks Ray for, and how many there may be."""

    fewest: int
    most: int
    cpus: int
    gpus: float

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def resources_of(config: TrainConfig, there: Machines) -> tuple[Resources, int]:
    """What a worker asks for, and how many such workers the machines can give.

    Where cores are not asked for, each worker gets as many as leave room for the most workers, else for the fewest;
    beside a GPU one, unless the CPU has the optimizer's work (`cpu_offload`)."""
    fewest, most = config.worker_range
    gpus = there.gpus_each(config.gpus_per_worker)
    choices = [config.cpus_per_worker or (1 if gpus and not config.cpu_offload else 0)]
    if not choices[0]:
        choices = list(range(max(1, int(there.most("CPU"))), 0, -1))
    room = {cpus: there.room(Resources(fewest, most, cpus, gpus).per_worker) for cpus in choices}
    fitting = [cpus for wanted in (most, fewest) for cpus in choices if room[cpus] >= wanted]
    cpus = fitting[0] if fitting else choices[-1]
    return Resources(fewest, most, cpus, gpus), room[cpus]


def wait_for_room(config: TrainConfig, listener: Listener, *, again: bool = False) -> Resources:
    """What a worker gets, as soon as the cluster's machines, busy or not, can give the fewest workers. Until then it is
    asked for the most, and as long as more machines keep joining they are waited for.

    again: whether there was room for them before. Raises: UserError if they cannot and it cannot grow; MachineError if
    it has not grown so far in `config.wait`, or machines were lost."""
    grows = may_grow()
    least, before = resources_of(config, machines())

    def wait(room: int, seconds: float) -> tuple[Resources, int]:
        there = await_room(
            lambda there: resources_of(config, there)[1] >= room,
            least.per_worker,
            least.most,
            seconds,
            lambda text: listener.phase(text, 0),
        )
        return resources_of(config, there)

    resources, room = wait(least.fewest, config.wait if grows else 0.0)
    if room < resources.fewest:
        can = f"workers {resources.fewest} of {told(resources.per_worker)} each: the cluster can give {room}"
        ask = "ask for fewer, or for less of each (cpus_per_worker, gpus_per_worker)"
        if grows:
            raise MachineError(f"{can} after {config.wait:g} s of waiting; let it grow further, or {ask}")
        if again:
            raise MachineError(f"{can} by now; {GOES_ON}, also with fewer workers")
        raise UserError(f"{can}; {ask}")
    while before < room < resources.most:
        before = room
        resources, room = wait(room + 1, min(_JOIN_SECONDS, config.wait))
    return resources


def workers_now(resources: Resources, seconds: float) -> int:
    """As many workers as what is free now has room for, between the fewest and the most.

    seconds: how long what is in use may take to become free, as after the end of a group of workers."""
    if resources.fewest == resources.most:
        return resources.fewest
    wanted = min(resources.most, machines().room(resources.per_worker))
    deadline = time.monotonic() + seconds
    while (room := free().room(resources.per_worker)) < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    return min(max(room, resources.fewest), resources.most)
