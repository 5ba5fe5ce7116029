"""One weight type of a 70B model: memory within the stated budget, time per layer constant in the number of layers.

    python -m pipelines.benchmark.large --layers 4,8,16 --rank 256 --memory-budget 6GB
    python -m pipelines.benchmark.large --layers 80 --rank 0 --device cuda --memory-budget 90GB --runs 1  # on a GPU

The layers have the shape of Llama-3-70B's gate_proj, 28,672 × 8,192 in bfloat16 (470 MB each), made tensor by tensor in
`--folder`. Each number of layers is a fresh process that reads them, finds the basis, fits the predictor and writes the
new layers of the top half as safetensors. What does not fit the budget lies in `--folder` too. On a CPU a rank makes
this bearable: without one the eigenvectors of a 28,672-row Gram matrix take hours there. Printed: seconds by phase,
seconds per layer (old and new together, as both cost), the process's peak memory beside the interpreter against the
budget, and the exponent of time in the layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from lesa_ray.config import LesaSettings
from lesa_ray.gpu import gpu_memory
from lesa_ray.lesa.cost import UnitCost, unit_cost
from lesa_ray.lesa.task import Task
from lesa_ray.sizes import parse_size
from pipelines.benchmark.fresh import Unit, exponent, in_fresh_process
from pipelines.benchmark.layers import Weights

D_FF, D_MODEL = 28_672, 8_192


@dataclass(frozen=True)
class Row:
    """Medians for one number of layers."""

    layers: int
    new: int
    seconds: float
    phases: dict[str, float]
    peak: int
    """Bytes beside the interpreter."""
    device_peak: int

    @property
    def per_layer(self) -> float:
        return self.seconds / (self.layers + self.new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,16")
    parser.add_argument("--d1", type=int, default=D_FF)
    parser.add_argument("--d2", type=int, default=D_MODEL)
    parser.add_argument("--rank", type=int, default=256, help="0: every direction")
    parser.add_argument("--memory-budget", default="6GB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", help="where the layers are made and the results go; a temporary one if not given")
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    counts = [int(count) for count in options.layers.split(",")]
    budget = parse_size(options.memory_budget)
    settings = LesaSettings(rank=options.rank or None)

    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        whole = Weights("gate", folder, max(counts), options.d1, options.d2)
        cost = cost_of(whole, settings, options.device, budget)
        needed = (whole.layers + len(whole.slots)) * options.d1 * options.d2 * 2
        if cost.coefficients == "scratch":
            needed += cost.coefficient_bytes
            enough = cost_of(whole, settings, options.device, None).host_memory
            print(
                f"{cost.coefficient_bytes / 1e9:.1f} GB of coefficients go to scratch, in {folder}; "
                f"--memory-budget {-(-enough // 10**6)}MB would keep them in memory",
                flush=True,
            )
        if needed > shutil.disk_usage(folder).free:
            raise SystemExit(f"{folder}: needs {needed / 1e9:.0f} GB; give fewer --layers or another --folder")
        whole.write(seed=0, device=options.device)
        if options.device == "cuda":
            torch.cuda.empty_cache()  # for the processes that follow
        for count in counts:
            weights = Weights("gate", folder, count, options.d1, options.d2)
            unit = Unit(weights, settings, options.threads, options.device, budget, folder)
            runs = [in_fresh_process(unit) for _ in range(options.runs)]
            middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
            seconds = statistics.median(run.seconds for run in runs)
            peak, device_peak = max(run.peak for run in runs), max(run.device_peak for run in runs)
            row = Row(count, len(weights.slots), seconds, middle.phases, peak, device_peak)
            rows.append(row)
            phases = ", ".join(f"{name} {value:.1f}" for name, value in row.phases.items())
            print(
                f"{count} → {count + row.new} layers: {row.seconds:.1f} s, {row.per_layer:.2f} s a layer; peak "
                f"{row.peak / 1e9:.2f} GB of {budget / 1e9:.2f}"
                + (f", {row.device_peak / 1e9:.2f} GB on the GPU" if row.device_peak else "")
                + f" ({phases})",
                flush=True,
            )
    if len(rows) > 1:
        power = exponent([(row.layers + row.new, row.seconds) for row in rows])
        print(f"seconds grow as (old + new layers)^{power:.2f}; memory as {_growth(rows)}")
    print("within the budget" if all(row.peak <= budget for row in rows) else "ABOVE the budget")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": [asdict(row) for row in rows]}, file, indent=1)


def cost_of(weights: Weights, settings: LesaSettings, device: Literal["cpu", "cuda"], budget: int | None) -> UnitCost:
    """What the unit is reckoned to take here."""
    memory = gpu_memory(None) if device == "cuda" else 0
    return unit_cost(
        Task(
            weights.d1,
            weights.d2,
            weights.layers,
            len(weights.slots),
            settings,
            device=device,
            memory_budget=budget,
            device_memory=memory,
        )
    )


def _growth(rows: list[Row]) -> str:
    return f"layers^{exponent([(row.layers, row.peak) for row in rows]):.2f}"


if __name__ == "__main__":
    main()
