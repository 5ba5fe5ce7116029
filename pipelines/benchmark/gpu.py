"""LESA on a GPU at the shapes of Llama-3-8B, against the released notebook's algorithm on the same GPU.

    python -m pipelines.benchmark.gpu
    python -m pipelines.benchmark.gpu --parts gram,ours --folder /dev/shm
    python -m pipelines.benchmark.gpu --device cpu --shrink 64 --layers 8      # a rehearsal

Parts
- gram: a large product in bfloat16, by which the chip is judged, and adding one layer to the Gram matrix, which is
  that of the unit: products, and their sums in float64.
- ours: all seven weight types from files to files of new layers, with the network and with ridge, a process a unit as
  on a cluster. Printed: seconds, shares by phase, the rate of the Gram phase (reading included), memory.
- notebook: its parts (`pipelines.benchmark.notebook` has all of it), for each shape in a process of its own. Steps of
  its training are timed for up to 1,500 and multiplied out; then come loading and torch.linalg.svd. What takes longer
  than `--limit` is stopped and what PyTorch refuses is said: both make the ratio a lower bound, marked ≥. Its
  predictions are left out, in its favour.

The whole unit of a 70B model's gate projection is `pipelines.benchmark.large --layers 80 --rank 0 --device cuda
--memory-budget 90GB --runs 1`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.fit import split_triples
from lesa_ray.lesa.spectral import add_gram
from pipelines.benchmark.fresh import Run, Unit, in_fresh_process
from pipelines.benchmark.large import cost_of
from pipelines.benchmark.layers import Weights
from pipelines.benchmark.notebook import EPOCHS, RELEASED, RIDGE, ROWS_A_STEP, SEED, all_layers, settled, training

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
ALIKE = {"q": 2, "k": 2, "gate": 2, "down": 1}
"""Weight types of a shape: q and o, k and v, gate and up."""
TIMED_STEPS = 1500
PARTS = ("gram", "ours", "notebook")


@dataclass(frozen=True)
class Theirs:
    """The notebook's parts for one shape, in seconds; None for what was not reached."""

    step: float | None
    """Of its training."""
    steps: int
    load: float | None = None
    svd: float | None = None
    refused: str | None = None

    @property
    def whole(self) -> float:
        """At least."""
        return (self.step or 0.0) * self.steps + (self.load or 0.0) + (self.svd or 0.0)

    @property
    def is_whole(self) -> bool:
        return self.step is not None and self.svd is not None and self.refused is None


@dataclass
class Figures:
    """All that was measured."""

    gram: dict[str, float] = field(default_factory=dict)
    """Operations a second: of the chip's product (`chip`), and of the Gram step by shape."""
    ours: dict[str, dict[str, Run]] = field(default_factory=dict)
    """By way (network, ridge) and shape."""
    notebook: dict[str, Theirs] = field(default_factory=dict)


def median_seconds(call: Callable[[], object], device: str, times: int = 5) -> float:
    call()
    found = []
    for _ in range(times):
        start = settled(device)
        call()
        found.append(settled(device) - start)
    return statistics.median(found)


def gram_rates(units: list[Weights], device: str, shrink: int) -> dict[str, float]:
    """Operations a second."""
    n = 8192 // shrink
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    rates = {"chip": 2.0 * n**3 / median_seconds(lambda: a @ b, device)}
    for unit in units:
        layer = torch.randn(unit.d1, unit.d2, device=device).mul_(0.02).bfloat16()
        gram = torch.zeros(unit.d1, unit.d1, dtype=torch.float64, device=device)
        seconds = median_seconds(lambda gram=gram, layer=layer: add_gram(gram, layer), device)  # type: ignore[misc]
        rates[unit.name] = gram_flops(unit, RELEASED, device) / unit.layers / seconds
    return rates


def gram_flops(unit: Weights, settings: LesaSettings, device: Any) -> float:
    """Of all layers."""
    cost = cost_of(unit, settings, device, None)
    return next(sum(phase.flops.values()) for phase in cost.phases if phase.name == "gram")


def parts_of_notebook(weights: Weights, device: str, threads: int, pipe: Connection) -> None:
    """Send what each part took as soon as it is known."""
    torch.set_num_threads(threads)
    trained, _ = split_triples(1, weights.layers, RELEASED.holdout, SEED)
    d2, rows = weights.d2, weights.d1 * len(trained)
    x, y = (torch.randn(rows, width, device=device).mul_(weights.d1**-0.5) for width in (2 * d2, d2))
    network, steps = training(x, y)
    timed = min(TIMED_STEPS, math.ceil(rows / ROWS_A_STEP))
    warm = 1 + timed // 10
    for _ in itertools.islice(steps, warm):
        pass
    start = settled(device)
    for _ in itertools.islice(steps, timed):
        pass
    pipe.send({"step": (settled(device) - start) / timed})
    del x, y, network, steps
    if device == "cuda":
        torch.cuda.empty_cache()
    start = settled(device)
    wide = torch.cat([layer.to(device) for layer in all_layers(weights)], dim=1)
    pipe.send({"load": settled(device) - start})
    start = settled(device)
    try:
        torch.linalg.svd(wide, full_matrices=False)
        pipe.send({"svd": settled(device) - start})
    except RuntimeError as error:
        pipe.send({"refused": " ".join(str(error).split())[:200]})


def theirs(weights: Weights, device: str, threads: int, limit: float) -> Theirs:
    """The notebook's parts, of what is done after `limit` seconds."""
    trained, _ = split_triples(1, weights.layers, RELEASED.holdout, SEED)
    found: dict[str, Any] = {"step": None, "steps": EPOCHS * math.ceil(weights.d1 * len(trained) / ROWS_A_STEP)}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=parts_of_notebook, args=(weights, device, threads, there), daemon=True)
    process.start()
    there.close()
    deadline = time.monotonic() + limit
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            found |= here.recv()
    except EOFError:  # it has ended
        pass
    finally:
        process.terminate()
        process.join(timeout=60)
    return Theirs(**found)


def show(figures: Figures, units: list[Weights], device: str) -> None:
    """Print what there is."""
    chip = figures.gram.get("chip")
    if chip is not None:
        print(f"product in bfloat16: {chip / 1e12:.3g} TFLOP/s; Gram step of a layer, beside that:")
        for unit in units:
            rate = figures.gram[unit.name]
            print(f"  {unit.d1} × {unit.d2}: {rate / 1e12:.3g} TFLOP/s, {rate / chip:.0%}")
    wholes = {}
    for way, runs in figures.ours.items():
        wholes[way] = sum(ALIKE[name] * run.seconds for name, run in runs.items())
        phases: dict[str, float] = {}
        for name, run in runs.items():
            for phase, seconds in run.phases.items():
                phases[phase] = phases.get(phase, 0.0) + ALIKE[name] * seconds
        shares = ", ".join(f"{phase} {seconds / sum(phases.values()):.0%}" for phase, seconds in phases.items())
        flops = sum(ALIKE[unit.name] * gram_flops(unit, RELEASED, device) for unit in units)
        print(f"ours, {way}: {wholes[way]:.1f} s for the seven types ({shares})")
        print(f"  Gram phase, with waiting for layers: {flops / phases['gram'] / 1e12:.3g} TFLOP/s")
        host, gpu = (max(getattr(run, kind) for run in runs.values()) / 1e9 for kind in ("peak", "device_peak"))
        print(f"  peak beside the interpreter {host:.2f} GB, on the GPU {gpu:.2f} GB")
    if figures.notebook:
        for name, one in figures.notebook.items():
            svd = "not ended" if one.refused is None else f"refused ({one.refused})"
            if one.svd is not None:
                svd = f"{one.svd:.1f} s"
            step = "not reached" if one.step is None else f"{1e3 * one.step:.2f} ms"
            print(f"notebook, {ALIKE[name]} × {name}: svd {svd}; {one.steps:,} steps of {step}; {one.whole:.0f} s each")
        whole = sum(ALIKE[name] * one.whole for name, one in figures.notebook.items())
        least = "" if all(one.is_whole for one in figures.notebook.values()) else "≥ "
        print(f"notebook: {least}{whole:.0f} s")
        for way, seconds in wholes.items():
            print(f"ratio, {way}: {least}{whole / seconds:.1f}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for the notebook's parts of one shape")
    parser.add_argument("--folder", help="where the layers are made and the results go; a temporary one if not given")
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    figures = Figures()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        units = [
            Weights(name, folder, options.layers, d1 // options.shrink, d2 // options.shrink)
            for name, (d1, d2) in SHAPES.items()
        ]
        if "gram" in parts:
            figures.gram = gram_rates(units, options.device, options.shrink)
        if {"ours", "notebook"} & set(parts):
            for seed, unit in enumerate(units):
                unit.write(seed, options.device)
        if options.device == "cuda":
            torch.cuda.empty_cache()  # for the processes that follow
        if "ours" in parts:
            for way, settings in (("network", RELEASED), ("ridge", RIDGE)):
                figures.ours[way] = {
                    unit.name: in_fresh_process(Unit(unit, settings, options.threads, options.device, None, folder))
                    for unit in units
                }
        if "notebook" in parts:
            for unit in units:
                figures.notebook[unit.name] = theirs(unit, options.device, options.threads, options.limit)
    show(figures, units, options.device)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), **asdict(figures)}, file, indent=1)


if __name__ == "__main__":
    main()
