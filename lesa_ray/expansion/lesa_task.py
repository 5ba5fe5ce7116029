"""What LESA's cost model has to know of a unit, taken from the job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.checkpoint.header import FLOAT_BYTES
from lesa_ray.expansion.method import Device, Job, RunContext
from lesa_ray.lesa.cost import require_device_memory, require_host_memory
from lesa_ray.lesa.route import Route, route_of
from lesa_ray.lesa.task import Task

_ANY_AMOUNT = 2**60


def lesa_task(
    job: Job,
    types: Iterable[WeightType],
    *,
    device: Device = "cpu",
    memory_budget: int | None = None,
    device_memory: int = 0,
) -> Task:
    """The unit that fits `types`: one weight type, or experts of one shape, which share a basis and a predictor or have
    each its own."""
    members = list(types)
    sharing = len(members) if job.config.lesa.share_experts else 1
    return Task(
        d1=members[0].d1,
        d2=members[0].d2,
        layers=job.anatomy.layers,
        slots=len(job.plan.slots) * len(members),
        settings=job.config.lesa,
        checkpoints=sharing * (1 + len(job.config.variants)),
        basis=sharing,
        fits=len(members) // sharing,
        element_bytes=FLOAT_BYTES[members[0].dtype],
        device=device,
        memory_budget=memory_budget,
        device_memory=device_memory,
    )


def task_here(job: Job, types: Iterable[WeightType], context: RunContext) -> Task:
    """The same unit where it runs, for the budget that was given.

    What its GPU has no room for lies in host memory: a budget that does on a large GPU may be refused on a smaller one,
    and in a cluster of several sizes by the units that are dealt those."""
    return lesa_task(
        job,
        types,
        device=context.device,
        memory_budget=job.config.memory_budget,
        device_memory=context.device_memory,
    )


def require_room(job: Job, types: Iterable[WeightType], context: RunContext, name: str) -> None:
    """Before unit `name` reads its layers. Raises: RoomError if a budget that was given, or its share of the GPU, is
    smaller than what it needs where it runs."""
    task = task_here(job, types, context)
    require_host_memory(task, name)
    if task.device == "cuda":
        known = replace(task, memory_budget=context.memory_budget)  # it decides the place of the coefficients
        settings = task.settings.model_copy(update={"svd": route_of(task)})
        require_device_memory(replace(known, settings=settings), name)


def check_budget(job: Job, types: Iterable[WeightType], name: str) -> None:
    """Hold a budget that was given against what is known of unit `name` before it runs: what it takes on CPUs where no
    GPU may be used, else what it takes beside a GPU with room for all that can lie there. Raises: RoomError."""
    device: Device = "cpu" if job.config.gpus_per_task == 0 else "cuda"
    task = lesa_task(job, types, device=device, memory_budget=job.config.memory_budget, device_memory=_ANY_AMOUNT)
    require_host_memory(task, name)


def lesa_route(job: Job, types: Iterable[WeightType]) -> Route:
    """The spectral route of the unit that fits `types`, by what was stated alone: the same wherever it runs."""
    return route_of(lesa_task(job, types, memory_budget=job.config.memory_budget))
