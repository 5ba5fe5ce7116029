"""What an expansion will need on a cluster: seconds, bytes and memory, before it is run.

Units come from the method with their operations and memory; LESA's are counted phase by phase by `lesa.cost`. They are
scheduled as the runner does it, then the result is assembled, which is bound by storage. Start-up, a few seconds for
Ray and torch, is not in it. How far such predictions are off is what `pipelines.benchmark.simulate --check` measures.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from lesa_ray.budget import require_budget
from lesa_ray.expansion.cluster_spec import ClusterSpec
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.lesa_task import lesa_route, lesa_task
from lesa_ray.expansion.memory import INTERPRETER_BYTES, UNIT_SHARE
from lesa_ray.expansion.method import Unit
from lesa_ray.expansion.schedule import Placed, Work, peak_memory, schedule
from lesa_ray.expansion.workbench import unit_tensors
from lesa_ray.gpu import DEVICE_SHARE, share_bytes
from lesa_ray.lesa.cost import require_host_memory, unit_cost
from lesa_ray.lesa.rates import CPU_CORE, Rates, unit_seconds

CUDA_BYTES = 2 * 2**30
"""What CUDA's libraries and its context add to it."""
COPIER_BYTES = 150 * 2**20
"""A process that copies bytes."""


@dataclass(frozen=True)
class UnitEstimate:
    """One unit's needs. Bytes of host memory are those of the whole process."""

    name: str
    flops: float
    seconds: dict[str, float]
    """By phase."""
    read_bytes: int
    written_bytes: int
    host_memory: int
    device_memory: int
    route: str | None = None
    coefficients: str | None = None
    """Where LESA keeps them: device, memory or scratch."""
    coefficient_bytes: int = 0

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate:
    """Seconds, bytes and floating-point operations of a whole expansion on a cluster."""

    cluster: ClusterSpec
    units: tuple[UnitEstimate, ...]
    placed: dict[str, Placed]
    assembly_read: int
    """Bytes that pass through the nodes when the result is assembled, each way."""
    assembly_written: int
    unit_seconds: float
    """Until the last unit has ended."""
    assembly_seconds: float
    memory: int
    """Largest process."""
    node_memory: int
    """All processes of one node together, at most."""
    device_memory: int
    """Of the largest unit; 0 without a GPU."""
    gpu_share: int
    """Bytes of a GPU that each unit has; 0 without."""
    cpus_per_task: int

    @property
    def seconds(self) -> float:
        return self.unit_seconds + self.assembly_seconds

    @property
    def flops(self) -> float:
        return sum(unit.flops for unit in self.units)

    @property
    def read_bytes(self) -> int:
        return sum(unit.read_bytes for unit in self.units) + self.assembly_read

    @property
    def written_bytes(self) -> int:
        return sum(unit.written_bytes for unit in self.units) + self.assembly_written

    @property
    def better_cpus_per_task(self) -> int | None:
        """`cpus_per_task` by which units on CPUs would keep more than twice as many cores busy; None if none would."""
        if self.device_memory or not self.units:
            return None
        nodes, cores = self.cluster.nodes, self.cluster.cpus_per_node
        on_a_node = math.ceil(min(len(self.units), nodes * cores) / nodes)
        more = cores // on_a_node
        return more if more > 2 * self.cpus_per_task else None

    @property
    def short_of(self) -> str | None:
        """What does not fit, in words; None if all does."""
        if self.memory > self.cluster.memory_per_node:
            return "the largest process needs more memory than a node has"
        if self.device_memory > self.gpu_share:
            share = "its share of a GPU" if self.gpu_share < share_bytes(self.cluster.gpu_memory, None) else "a GPU"
            return f"the largest unit needs more memory than {share} has"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "cluster": self.cluster.model_dump(),
            "seconds": self.seconds,
            "unit_seconds": self.unit_seconds,
            "assembly_seconds": self.assembly_seconds,
            "flops": self.flops,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "memory": self.memory,
            "node_memory": self.node_memory,
            "device_memory": self.device_memory,
            "short_of": self.short_of,
            "units": [{**asdict(unit), "total": unit.total, **asdict(self.placed[unit.name])} for unit in self.units],
        }


def estimate(expansion: Expansion, cluster: ClusterSpec, rates: Rates | None = None) -> Estimate:
    """Needs of an expansion on `cluster`; `rates`: of the place of one unit, by default those of the cluster's kind.

    Raises: RoomError if a unit does not fit a memory budget that was given.
    """
    config = expansion.job.config
    cores = min(config.cpus_per_task, cluster.cpus_per_node)
    share = 1.0 if config.gpus_per_task is None else config.gpus_per_task
    on_gpu = cluster.gpu is not None and share > 0
    slots = max(cluster.cpus_per_node // cores, 1)
    if on_gpu:
        slots = min(slots, max(int(cluster.gpus_per_node / share), 1))
    elif cluster.gpu is not None:
        cluster = cluster.model_copy(update={"gpu": None, "gpus_per_node": 0})
    rates = rates or cluster.rates(cores).times(share if on_gpu else 1)

    at_once = max(min(len(expansion.units), slots * cluster.nodes), 1)
    device_memory = share_bytes(cluster.gpu_memory, share) if on_gpu else 0
    units = tuple(_unit(expansion, unit, cluster, rates, at_once, device_memory) for unit in expansion.units)
    needs = {unit.name: unit for unit in units}
    work = [
        Work(unit.name, needs[unit.name].total, needs[unit.name].host_memory, unit.flops, unit.after)
        for unit in expansion.units
    ]
    placed = schedule(work, cluster.nodes, slots, cluster.memory_per_node)

    scratch = expansion.scratch_bytes
    passing = scratch if cluster.server_side_copies else expansion.nbytes
    writers = max(min(len(expansion.shards), cluster.nodes * cluster.cpus_per_node), 1)
    return Estimate(
        cluster=cluster,
        units=units,
        placed=placed,
        assembly_read=passing,
        assembly_written=passing,
        unit_seconds=max((at.end for at in placed.values()), default=0.0),
        assembly_seconds=passing / (writers * cluster.storage(writers)),
        memory=max((unit.host_memory for unit in units), default=COPIER_BYTES),
        node_memory=max(peak_memory(work, placed), COPIER_BYTES),
        device_memory=max((unit.device_memory for unit in units), default=0),
        gpu_share=device_memory,
        cpus_per_task=cores,
    )


def _unit(
    expansion: Expansion, unit: Unit, cluster: ClusterSpec, rates: Rates, at_once: int, device_memory: int
) -> UnitEstimate:
    job, storage = expansion.job, cluster.storage(at_once)
    types = job.method.fitted(job, unit)
    interpreter = INTERPRETER_BYTES + (CUDA_BYTES if device_memory else 0)
    written = sum(tensor.nbytes for tensor in unit_tensors(job, unit))
    if not types:
        read = unit.reads or 2 * written
        on_gpu = unit.device_memory if unit.device_memory <= DEVICE_SHARE * device_memory else 0
        if unit.device_memory and device_memory and not on_gpu:  # then it runs on the GPU's host
            rates = CPU_CORE.times(min(job.config.cpus_per_task, cluster.cpus_per_node))
        seconds = {"read": read / storage, "compute": unit.flops / rates.fp32, "write": written / storage}
        needed = unit.memory - on_gpu
        require_budget(job.config.memory_budget, needed, f"{job.method.name} ({unit.name})", "or a larger GPU")
        memory = needed + interpreter
        return UnitEstimate(unit.name, unit.flops, seconds, read, written, memory, on_gpu)
    task = lesa_task(
        job,
        types,
        device="cuda" if device_memory else "cpu",
        memory_budget=job.config.memory_budget or cluster.memory_per_unit or int(UNIT_SHARE * cluster.memory_per_node),
        device_memory=device_memory,
    )
    # Decided already, by what was stated and not by what this cluster has.
    task = replace(task, settings=task.settings.model_copy(update={"svd": lesa_route(job, types)}))
    if job.config.memory_budget is not None:
        require_host_memory(task, unit.name)
    cost = unit_cost(task)
    return UnitEstimate(
        name=unit.name,
        flops=cost.flops,
        seconds=unit_seconds(cost, rates, storage, cluster.scratch),
        read_bytes=cost.read_bytes,
        written_bytes=written,
        host_memory=cost.host_memory + interpreter,
        device_memory=cost.device_memory,
        route=cost.route,
        coefficients=cost.coefficients,
        coefficient_bytes=cost.coefficient_bytes,
    )
