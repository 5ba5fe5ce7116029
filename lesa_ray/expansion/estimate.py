"""What an expansion will need: bytes, memory and time, before it is run.

Bytes follow from the layout, memory from the units; time is arithmetic and bytes over the rates below. They are round
figures of ordinary machines, so the time is an order of magnitude, and is shown with the rates it stands on.
"""

from __future__ import annotations

from dataclasses import dataclass

from lesa_ray.expansion.prepare import Expansion

CPU_FLOPS = 40e9
"""float32 operations a second of one core with AVX2 or AVX-512, as measured in the predictor's steps."""
GPU_FLOPS = 20e12
"""float32 operations a second of a data-centre GPU on matrices of this size."""
DISK_BYTES = 500e6
"""Bytes a second through the filesystem or the object store, each way."""
_PROCESS = 600 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Seconds, bytes and floating-point operations."""

    read_bytes: int
    written_bytes: int
    flops: float
    memory: int
    """Largest process."""
    seconds_cpu: float
    """With two cores."""
    seconds_gpu: float
    """With one GPU."""


def estimate(expansion: Expansion) -> Estimate:
    """Rough needs of an expansion."""
    units = expansion.units
    flops = sum(unit.flops for unit in units)
    base, written = expansion.checkpoint.nbytes, expansion.nbytes + 2 * expansion.scratch_bytes
    read = base * (3 if units and expansion.job.method.name == "lesa" else 1) + written - base
    transfer = (read + written) / DISK_BYTES
    return Estimate(
        read_bytes=read,
        written_bytes=written,
        flops=flops,
        memory=max((unit.memory for unit in units), default=0) + (_PROCESS if units else _PROCESS // 4),
        seconds_cpu=flops / (2 * CPU_FLOPS) + transfer,
        seconds_gpu=flops / GPU_FLOPS + transfer,
    )
