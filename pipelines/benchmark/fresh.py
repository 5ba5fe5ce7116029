"""One unit of LESA in a process of its own, so that its peak memory is its own; and how costs grow."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from lesa_ray.config import LesaSettings
from pipelines.benchmark.layers import Weights


@dataclass(frozen=True)
class Unit:
    """What to run: a weight type from its file to a file of new layers, with given means."""

    weights: Weights
    settings: LesaSettings
    threads: int = 1
    device: str = "cpu"
    memory_budget: int | None = None
    folder: str = "/tmp"
    """Where the new layers and, if need be, the coefficients go."""


@dataclass(frozen=True)
class Run:
    """What it took: wall-clock seconds, and bytes beside the interpreter with its libraries loaded."""

    seconds: float
    phases: dict[str, float]
    peak: int
    device_peak: int


def in_fresh_process(unit: Unit) -> Run:
    """Run a unit once. Its start and imports are not counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, unit).result()


def _run(unit: Unit) -> Run:
    import torch

    from lesa_ray.checkpoint.shards import OutTensor
    from lesa_ray.checkpoint.storage import Storage
    from lesa_ray.checkpoint.writer import TensorFileWriter
    from lesa_ray.expansion.memory import return_freed_memory
    from lesa_ray.expansion.runner import own_peak_memory
    from lesa_ray.lesa.fit import fit_weight_type

    torch.set_num_threads(unit.threads)
    return_freed_memory()
    torch.linalg.eigh(torch.eye(8, device=unit.device))
    weights, storage = unit.weights, Storage(unit.folder)
    planned = tuple(OutTensor(str(slot), "BF16", (weights.d1, weights.d2), None) for slot, _, _ in weights.slots)
    before = own_peak_memory()
    if unit.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with storage.create("new.safetensors") as file:
        writer = TensorFileWriter(file, planned)
        report = fit_weight_type(
            weights.load(),
            weights.layers,
            weights.slots,
            lambda slot, weight: writer.write(str(slot), weight),
            unit.settings,
            seed=0,
            device=unit.device,
            scratch_dir=unit.folder,
            memory_budget=unit.memory_budget,
        )
        writer.finish()
    seconds = time.perf_counter() - start
    os.unlink(storage.path("new.safetensors"))
    device_peak = torch.cuda.max_memory_allocated() if unit.device == "cuda" else 0
    return Run(seconds, report.seconds, own_peak_memory() - before, device_peak)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """p of y ≈ c·x^p, by least squares of the logarithms."""
    x, y = (np.array([math.log(point[axis]) for point in points]) for axis in (0, 1))
    return float(np.polyfit(x, y, 1)[0])
