"""How the cost of LESA grows: seconds and memory against layers, width and workers, with the fitted exponents.

    python -m pipelines.benchmark.scaling --layers 8,20,40,80 --widths 256,512,1024,2048 --workers 1,2

Layers and widths: one weight type (d, d) in bfloat16, default settings, one thread, a fresh process for each run; 512
wide when the layers vary, 12 layers when the width does. Workers: a whole expansion of a small Llama (12 layers,
d = 512, d_ff = 1,408) by Ray tasks on an embedded Ray with so many CPUs, which is started before the time is taken.
Runs of one kind take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from lesa_ray.config import LesaSettings
from pipelines.benchmark.fresh import Run, Unit, exponent, in_fresh_process
from pipelines.benchmark.layers import Weights

WIDTH, LAYERS = 512, 12
MODEL = {"layers": 12, "d_model": 512, "d_ff": 1408}


@dataclass(frozen=True)
class Point:
    """Medians at one size."""

    size: int
    seconds: float
    peak_mb: float | None
    """Beside the interpreter; None where several processes worked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=_sizes, default=[8, 20, 40, 80])
    parser.add_argument("--widths", type=_sizes, default=[256, 512, 1024, 2048])
    parser.add_argument("--workers", type=_sizes, default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    found: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        found["layers"] = _units(options.layers, options.runs, lambda n: Weights(f"l{n}", folder, n, WIDTH, WIDTH))
        found["width"] = _units(options.widths, options.runs, lambda d: Weights(f"d{d}", folder, LAYERS, d, d))
        if options.workers:
            found["workers"] = _expansions(options.workers, options.runs, folder)
    for name, points in found.items():
        print(f"\n{name:>8}{'seconds':>10}{'MB':>8}")
        for point in points:
            print(f"{point.size:>8}{point.seconds:>10.2f}" + (f"{point.peak_mb:>8.0f}" if point.peak_mb else ""))
        if len(points) > 1:
            line = f"seconds ~ {name}^{exponent([(p.size, p.seconds) for p in points]):.2f}"
            memory = [(p.size, p.peak_mb) for p in points if p.peak_mb]
            print(line + (f", MB ~ {name}^{exponent(memory):.2f}" if len(memory) > 1 else ""))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({name: [vars(p) for p in points] for name, points in found.items()}, file, indent=1)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _units(sizes: list[int], runs: int, make: Callable[[int], Weights]) -> list[Point]:
    """One weight type at each size."""
    units = {}
    for size in sizes:
        weights = make(size)
        weights.write(seed=0)
        units[size] = Unit(weights, LesaSettings(), folder=weights.folder)
    measured: dict[int, list[Run]] = {size: [] for size in sizes}
    for _ in range(runs):
        for size in sizes:
            measured[size].append(in_fresh_process(units[size]))
    return [
        Point(
            size,
            statistics.median(run.seconds for run in measured[size]),
            statistics.median(run.peak for run in measured[size]) / 1e6,
        )
        for size in sizes
    ]


_EXPANSION = """
import json, sys, time
import ray
from lesa_ray import ExpandConfig, expand
base, out, cpus = sys.argv[1:]
ray.init(address="local", num_cpus=int(cpus), include_dashboard=False, log_to_driver=False)
ray.get([ray.remote(lambda: __import__("torch").ones(1)).remote() for _ in range(int(cpus))])
start = time.perf_counter()
expand(ExpandConfig(base=base, out=out, method="lesa"))
print(json.dumps(time.perf_counter() - start))
"""


def _expansions(workers: list[int], runs: int, folder: str) -> list[Point]:
    """The small Llama, expanded by so many Ray workers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = os.path.join(folder, "base")
    config = LlamaConfig(
        hidden_size=MODEL["d_model"],
        intermediate_size=MODEL["d_ff"],
        num_hidden_layers=MODEL["layers"],
        num_attention_heads=8,
        vocab_size=512,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    seconds: dict[int, list[float]] = {count: [] for count in workers}
    for run in range(runs):
        for count in workers:
            command = [sys.executable, "-c", _EXPANSION, base, os.path.join(folder, f"out-{run}-{count}"), str(count)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
            seconds[count].append(float(done.stdout.strip().splitlines()[-1]))
    return [Point(count, statistics.median(seconds[count]), None) for count in workers]


if __name__ == "__main__":
    main()
