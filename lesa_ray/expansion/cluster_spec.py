"""A cluster described by figures, for predictions: `--cluster FILE` of `lesa-ray inspect` and of the simulation.

Sizes and rates are numbers of bytes (a second), or text such as `80GB`.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field, model_validator

from lesa_ray.config import Settings, read_yaml, validated
from lesa_ray.errors import UserError
from lesa_ray.lesa.rates import CPU_CORE, GPU_MEMORY, GPUS, Rates
from lesa_ray.limits import all_cpus, all_memory
from lesa_ray.sizes import Bytes

GpuKind = Literal["a100", "h100", "h200"]


class ClusterSpec(Settings):
    """Equal nodes, and the storage that BASE and OUT are in."""

    nodes: int = Field(default=1, ge=1)
    cpus_per_node: int = Field(ge=1)
    memory_per_node: Bytes
    memory_per_unit: Bytes | None = None
    """Host memory for one unit; coefficients that do not fit lie in scratch. None: four fifths of a node's."""
    gpus_per_node: int = Field(default=0, ge=0)
    gpu: GpuKind | None = None
    """Which; without one units run on CPUs."""
    storage_per_node: Bytes = 500_000_000
    """Bytes a second that one node reads from storage, and as many that it writes: the slower of network and disk."""
    storage_total: Bytes | None = None
    """Of all nodes together; None: as many as they can."""
    scratch: Bytes = 1_000_000_000
    """Bytes a second of a node's local disk, where coefficients go that fit nowhere else."""
    server_side_copies: bool = False
    """Whether BASE and OUT are in one object store, which copies old layers itself."""

    @model_validator(mode="after")
    def _gpus_are_of_a_kind(self) -> ClusterSpec:
        if (self.gpus_per_node > 0) != (self.gpu is not None):
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node} and gpu is {self.gpu}; give both or none "
                f"(gpu: {', '.join(GPUS)})"
            )
        return self

    @property
    def gpu_memory(self) -> int:
        """Bytes of one GPU; 0 without."""
        return GPU_MEMORY[self.gpu] if self.gpu else 0

    def rates(self, cores: int) -> Rates:
        """Of the place where one unit runs: a GPU, or `cores` CPU cores."""
        return GPUS[self.gpu] if self.gpu else CPU_CORE.times(cores)

    def storage(self, tasks: int) -> float:
        """Bytes a second for each of `tasks` that read at one time, spread over the nodes."""
        per_node = -(-tasks // self.nodes)
        share = self.storage_per_node / per_node
        return min(share, self.storage_total / tasks) if self.storage_total else share


def read_cluster(path: str) -> ClusterSpec:
    """A cluster from a YAML file, a path or an fsspec URL. Raises: UserError naming the first setting that is wrong."""
    data = read_yaml(path)
    for name, setting in ClusterSpec.model_fields.items():
        if setting.is_required() and name not in data:
            raise UserError(f"cluster {path}: {name} is missing")
    return validated(ClusterSpec, data, f"cluster {path}")


def this_machine() -> ClusterSpec:
    """The machine that asks, or the container, its GPUs if it has some of a known kind; storage as by default."""
    cpus, memory = all_cpus(), all_memory()
    names = _gpu_names()
    kinds = [kind for name in names for kind in GPUS if kind.upper() in name.upper()]
    if not kinds:
        return ClusterSpec(cpus_per_node=cpus, memory_per_node=memory)
    gpu: GpuKind = kinds[0]  # type: ignore[assignment]
    return ClusterSpec(cpus_per_node=cpus, memory_per_node=memory, gpus_per_node=len(kinds), gpu=gpu)


def _gpu_names() -> list[str]:
    """Of NVIDIA's GPUs; torch, whose import takes seconds, is asked only where there is a driver."""
    if not os.path.exists("/proc/driver/nvidia/version"):
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
