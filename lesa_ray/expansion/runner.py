"""Who does the work of an expansion: the runner's interface, and the one that needs no Ray.

`InlineRunner` works unit after unit in this process. It serves where there is nothing to compute (copying methods on
a local disk: starting Ray would cost more than the copy), where Ray is not installed, and in the tests as the
yardstick for the others."""

from __future__ import annotations

import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from lesa_ray.checkpoint.shards import Shard
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import write_shard
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.method import Device, Unit
from lesa_ray.expansion.workbench import run_unit


class Listener(Protocol):
    """Is told how far an expansion is."""

    def phase(self, name: str, total: float) -> None:
        """A phase with `total` work begins."""

    def progress(self, done: float, detail: str) -> None:
        """`done` of the phase's work is done; `detail` says what is under way."""


class Silent:
    """A listener for callers that want no progress."""

    def phase(self, name: str, total: float) -> None: ...

    def progress(self, done: float, detail: str) -> None: ...


class Runner(Protocol):
    """Does the units' work and writes the shards."""

    def run_units(self, expansion: Expansion, units: list[Unit], listener: Listener) -> dict[str, Any]:
        """Work on units, each after those it needs; returns their records by name."""

    def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
        """Write files of the result."""

    def peak_memory(self) -> int:
        """Largest resident set, in bytes, of any process that worked."""


def own_peak_memory() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux from VmHWM, which starts anew with the program; getrusage's figure is inherited through fork and exec.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def weight_of(unit: Unit) -> float:
    """What a unit counts for in a progress bar."""
    return unit.flops + 1e6


class InlineRunner:
    """Runs units one after another in this process, and writes shards in threads."""

    def __init__(self, device: Device = "cpu") -> None:
        self.device = device

    def run_units(self, expansion: Expansion, units: list[Unit], listener: Listener) -> dict[str, Any]:
        records: dict[str, Any] = {}
        done = 0.0
        for unit in units:
            start = done

            def progress(phase: str, share: float, unit: Unit = unit, start: float = start) -> None:
                listener.progress(start + share * weight_of(unit), f"{unit.name}: {phase}")

            records[unit.name] = run_unit(
                expansion.job,
                unit,
                expansion.made_in,
                expansion.checkpoints,
                expansion.job.config.out,
                device=self.device,
                threads=expansion.job.config.cpus_per_task,
                progress=progress,
            )
            done += weight_of(unit)
            listener.progress(done, unit.name)
        return records

    def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
        storage = Storage(expansion.job.config.out)
        done = 0
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            futures = {pool.submit(write_shard, storage, shard): shard for shard in shards}
            try:
                for future in as_completed(futures):
                    future.result()
                    done += futures[future].nbytes
                    listener.progress(done, futures[future].file)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def peak_memory(self) -> int:
        return own_peak_memory()
