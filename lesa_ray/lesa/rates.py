"""How fast machines are at LESA's kinds of work, and the seconds that work takes on them.

A figure is what such work gets, not what the data sheet says: the peak times an efficiency that is stated beside it.
Where a machine is at hand `pipelines.benchmark.simulate --check` measures them instead, and says how far off the
predictions then are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lesa_ray.lesa.cost import Phase, UnitCost


@dataclass(frozen=True)
class Rates:
    """One GPU, or one CPU core. Operations and bytes a second, but `step`."""

    half: float
    """Products of bfloat16 or float16 matrices with float32 sums."""
    fp32: float
    """Products of float32 matrices; no TF32."""
    fp64: float
    """Products of float64 matrices."""
    eigh: float
    """`torch.linalg.eigh` in float64, counted as 9·d³ operations."""
    eigh_host: float
    """The same on the host, where a GPU has no memory for it."""
    narrow: float
    """A step of the predictor with its 64 rows, AdamW among it, by the operations of its float32 products."""
    step: float
    """Seconds that a step takes besides, whatever its size."""
    memory: float
    """Bytes read or written in element-wise work."""
    bus: float
    """Bytes between host memory and a GPU; without one those are the same."""

    def times(self, cores: float) -> Rates:
        """Several cores on one unit, or a part of a GPU: products scale with it, a predictor's step is too short to."""
        scaled = {name: getattr(self, name) * cores for name in ("half", "fp32", "fp64", "eigh", "eigh_host")}
        return replace(self, **scaled)


CPU_CORE = Rates(
    half=110e9, fp32=110e9, fp64=60e9, eigh=45e9, eigh_host=45e9, narrow=95e9, step=600e-6, memory=5e9, bus=math.inf
)
"""A core of a server with AVX-512 and MKL, one thread, as measured on a Xeon with 2 MB of second-level cache. Halves
are multiplied as float32; element-wise work is half in fresh memory, which takes three times as long as used memory."""

GPUS: dict[str, Rates] = {
    # NVIDIA A100 80GB SXM data sheet: bf16 312, fp32 19.5, fp64 tensor 19.5 TFLOP/s, 2.04 TB/s.
    "a100": Rates(
        half=200e12, fp32=16e12, fp64=14e12, eigh=2e12, eigh_host=45e9, narrow=4e12, step=80e-6, memory=1.5e12, bus=20e9
    ),
    # NVIDIA H100 SXM data sheet: bf16 989 (dense), fp32 67, fp64 tensor 67 TFLOP/s, 3.35 TB/s.
    "h100": Rates(
        half=550e12, fp32=45e12, fp64=45e12, eigh=3e12, eigh_host=45e9, narrow=8e12, step=60e-6, memory=2.4e12, bus=40e9
    ),
    # NVIDIA H200 SXM data sheet: the H100's arithmetic with 4.8 TB/s.
    "h200": Rates(
        half=550e12, fp32=45e12, fp64=45e12, eigh=4e12, eigh_host=45e9, narrow=8e12, step=60e-6, memory=3.4e12, bus=40e9
    ),
}
"""Efficiencies taken: bf16 products 0.55 to 0.65 of the peak, fp32 and fp64 0.7 to 0.8, memory 0.7;
PCIe 4 and 5 with 16 lanes 0.65. eigh is bound by
memory in its reduction to tridiagonal form: below 3 % of an H100's fp64 peak (arXiv 2410.02170). Not measured by us."""

GPU_MEMORY: dict[str, int] = {"a100": 80 * 10**9, "h100": 80 * 10**9, "h200": 141 * 10**9}
"""Bytes, from the same data sheets."""


LOOKED = 3
"""How often each byte of a layer is gone through as it arrives: stored, looked at for NaN and Inf, its norm taken."""


def phase_seconds(phase: Phase, rates: Rates) -> float:
    """Arithmetic and memory traffic of a phase, one after the other as they are in element-wise steps and products."""
    arithmetic = math.fsum(count / float(getattr(rates, kind)) for kind, count in phase.flops.items())
    return arithmetic + phase.traffic / rates.memory + phase.steps * rates.step


def unit_seconds(cost: UnitCost, rates: Rates, storage: float, scratch: float) -> dict[str, float]:
    """Seconds by phase of a unit that reads and writes `storage` bytes a second, and its scratch file `scratch`.

    Layers are read one ahead: of a pass over them only what takes longer than the work on them is waited for, which
    together with the first layer of each pass is `load`.
    """
    seconds = {"load": 0.0}
    for phase in cost.phases:
        work = phase_seconds(phase, rates)
        if cost.coefficients != "device":
            work += phase.moved / (scratch if cost.coefficients == "scratch" else rates.bus)
        if phase.read_bytes:
            byte = 1 / storage + LOOKED / rates.memory
            seconds["load"] += max(phase.read_bytes * byte - work, cost.layer_bytes * byte)
        seconds[phase.name] = work + phase.write_bytes / storage
    return seconds
