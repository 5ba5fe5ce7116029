"""Which stages run at a time: what each is reckoned to take, and which of those that could begin fit into the rest.

Ray itself gives tasks and workers what they ask for, when it is free. What is reckoned here only keeps stages from
being begun that would wait for each other, so it need not be exact: a stage is never refused for good, as the largest
begins when nothing else runs. The process that leads a stage takes no CPU of the cluster's, so that the stage's own
tasks always find room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lesa_ray.config import ExpandConfig, Settings
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.fleet.settings import Amount
from lesa_ray.machines import Machines
from lesa_ray.training.train_settings import TrainConfig

Item = TypeVar("Item")


def demand(settings: Settings, there: Machines) -> Amount:
    """What a stage asks Ray for at the same time; as its command decides where the settings do not."""
    if isinstance(settings, TrainConfig):
        workers = settings.worker_range[0]
        gpus = there.gpus_each(settings.gpus_per_worker)
        if settings.cpus_per_worker is None and not gpus:  # the cluster's cores are shared out among the workers
            return Amount(cpus=there.total("CPU"))
        return Amount(cpus=workers * (settings.cpus_per_worker or 1), gpus=workers * gpus)
    if isinstance(settings, ExpandConfig):
        return Amount(cpus=settings.cpus_per_task, gpus=there.gpus_each(settings.gpus_per_task))
    if isinstance(settings, EvaluateConfig):
        gpus = there.gpus_each(settings.gpus_per_task, settings.device)
        return Amount(cpus=settings.cpus_per_task or there.most("CPU"), gpus=gpus)
    return Amount(cpus=1.0)


def total_of(there: Machines, budget: Amount | None) -> Amount:
    """What all stages together may be reckoned to take."""
    if budget is not None:
        return budget
    return Amount(cpus=there.total("CPU"), gpus=there.total("GPU"))


def choose(
    ready: Sequence[Item], demand_of: Callable[[Item], Amount], running: Sequence[Amount], total: Amount, at_once: int
) -> list[Item]:
    """Those of `ready` to begin now: the largest first, smaller ones in the gaps they leave.

    Where nothing runs the largest begins whatever it takes: a cluster may grow, and Ray says what it cannot have."""
    cpus = total.cpus - sum(amount.cpus for amount in running)
    gpus = total.gpus - sum(amount.gpus for amount in running)
    chosen: list[Item] = []
    for item in sorted(ready, key=lambda one: (-demand_of(one).gpus, -demand_of(one).cpus)):
        need = demand_of(item)
        if len(running) + len(chosen) >= at_once:
            break
        if (need.cpus <= cpus and need.gpus <= gpus) or not (running or chosen):
            chosen.append(item)
            cpus, gpus = cpus - need.cpus, gpus - need.gpus
    return chosen
