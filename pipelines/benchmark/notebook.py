"""How much faster than the released notebook: the spectral step and the whole of LESA, on the same layers and settings.

    python -m pipelines.benchmark.notebook --layers 24 --d-model 512 --d-ff 1408 --runs 3 --threads 2 --json out.json

The notebook's algorithm (github.com/yangyifei729/LESA, train_LESA.ipynb) is written anew here, plainly: concatenate the
layers, torch.linalg.svd, build X and Y, TensorDataset and a shuffling DataLoader, AdamW for 10 epochs with λ = 5e-4,
predict a new layer for each gap of the top half. It runs one weight type after the other with all threads, as released.
Against it, `lesa_ray.lesa.fit_weight_type` with the same settings and rows, the largest types first, in as many worker
processes of one thread as the other has threads.

Layers are random walks W_i = 0.8·W_{i−1} + 0.6·noise, read from a file that is mapped into memory; q, k, v, o are
(d, d), gate and up (d_ff, d), down (d, d_ff). Neither side's time holds the start of processes, the import of torch or
the writing of results; ours holds its yardsticks, which the notebook lacks, and their share is printed. Runs alternate.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from lesa_ray.config import LesaSettings
from lesa_ray.expansion.runner import own_peak_memory
from lesa_ray.lesa.fit import fit_weight_type
from lesa_ray.lesa.spectral import decompose
from lesa_ray.lesa.streams import Load

RELEASED = LesaSettings.from_recipe("released-code", holdout=0.0)


@dataclass(frozen=True)
class Weights:
    """One weight type: its layers lie one after the other in a file of float32."""

    name: str
    path: str
    layers: int
    d1: int
    d2: int

    def load(self) -> Load:
        shape = (self.layers, self.d1, self.d2)
        return torch.from_file(self.path, size=math.prod(shape), dtype=torch.float32).view(shape).__getitem__

    @property
    def slots(self) -> list[tuple[int, int, int]]:
        """A new layer in each gap of the top half: layers 15 … 30 of 32 in the notebook."""
        start = self.layers // 2 - 1
        return [(self.layers + at, i, i + 1) for at, i in enumerate(range(start, self.layers - 1))]

    @property
    def work(self) -> int:
        """Grows like the training time: rows × parameters."""
        return self.d1 * (3 * self.d2 + RELEASED.hidden) * RELEASED.hidden


@dataclass(frozen=True)
class Outcome:
    """What one weight type took, and the loss at which its predictor ended."""

    name: str
    spectral: float
    whole: float
    yardsticks: float
    loss: float
    """Of the trained predictor over all its training rows, in batches of 64 in order."""
    cpu: float
    """Processor seconds of the whole, all threads: what a busy machine distorts least."""
    peak_mb: float
    """Peak resident memory of the process so far."""


def make_weights(folder: str, layers: int, d_model: int, d_ff: int) -> list[Weights]:
    """Write the layers of the seven weight types of a Llama to `folder`."""
    shapes = dict.fromkeys(("q", "k", "v", "o"), (d_model, d_model))
    shapes |= {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    made = []
    for seed, (name, (d1, d2)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed)
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            weight = 0.02 * torch.randn(d1, d2, generator=generator)
            for _ in range(layers):
                file.write(weight.numpy().tobytes())
                weight = 0.8 * weight + 0.6 * 0.02 * torch.randn(d1, d2, generator=generator)
        made.append(Weights(name, path, layers, d1, d2))
    return made


def start_worker(threads: int) -> None:
    """Settle what is not to be measured: threads, and the first call of each library."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.linalg.svd(torch.randn(8, 8) @ torch.randn(8, 8))
    parameter = nn.Parameter(torch.zeros(2))
    torch.optim.AdamW([parameter])


def ready(_: int) -> int:
    time.sleep(0.2)  # long enough that every worker takes part
    return os.getpid()


def run_notebook(weights: Weights) -> Outcome:
    """The released algorithm for one weight type."""
    load = weights.load()
    layers = [load(i).clone() for i in range(weights.layers)]  # the notebook holds the model in memory

    start, cpu = time.perf_counter(), time.process_time()
    concatenated = torch.cat(layers, dim=1)
    u, s, vt = torch.linalg.svd(concatenated, full_matrices=False)
    separate = [vt[:, i * weights.d2 : (i + 1) * weights.d2] for i in range(weights.layers)]
    spectral = time.perf_counter() - start

    inner = range(1, weights.layers - 1)
    x = torch.cat([torch.cat([separate[i - 1], separate[i + 1]], dim=1) for i in inner])
    y = torch.cat([separate[i] for i in inner])
    network = nn.Sequential(
        nn.Linear(2 * weights.d2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, weights.d2)
    )
    criterion = nn.MSELoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001)
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    for _ in range(10):
        total = 0.0
        for batch_x, batch_y in loader:
            optimizer.zero_grad()
            output = network(batch_x)
            norms = criterion(torch.norm(output, p=2), torch.norm(batch_y, p=2))
            loss = (1 - 0.0005) * criterion(output, batch_y) + 0.0005 * norms
            loss.backward()
            optimizer.step()
            total += loss.item()
    with torch.no_grad():
        predicted = [network(torch.cat([separate[a], separate[b]], dim=1)) for _, a, b in weights.slots]
        rebuilt = [(u * s) @ one for one in predicted]
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu

    assert len(rebuilt) == len(weights.slots)
    with torch.no_grad():
        final = fit_loss(network(x), y)
    return Outcome(weights.name, spectral, whole, 0.0, final, cpu, own_peak_memory() / 1e6)


def fit_loss(output: Tensor, target: Tensor) -> float:
    """The loss over all rows, (rows, d2), norms over batches of 64."""
    gaps = [a.norm() - b.norm() for a, b in zip(torch.split(output, 64), torch.split(target, 64), strict=True)]
    norm = torch.stack(gaps).square().mean()
    return float((1 - 0.0005) * (output - target).square().mean() + 0.0005 * norm)


def run_ours(weights: Weights) -> Outcome:
    made: list[Tensor] = []
    start, cpu = time.perf_counter(), time.process_time()
    report = fit_weight_type(
        weights.load(), weights.layers, weights.slots, lambda _, weight: made.append(weight), RELEASED, seed=0
    )
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu
    seconds = report.seconds
    spectral = seconds["load"] + seconds["spectral"]
    loss = report.trained["predictor"].loss
    return Outcome(weights.name, spectral, whole, seconds["yardsticks"], loss, cpu, own_peak_memory() / 1e6)


def run_our_spectral(weights: Weights) -> str:
    return decompose([weights.load()], weights.layers).route


@dataclass(frozen=True)
class Round:
    """Wall-clock seconds, losses and memory of one run of both sides."""

    notebook_spectral: float
    notebook_whole: float
    ours_spectral: float
    ours_whole: float
    ours_yardsticks: float
    notebook_cpu: float
    ours_cpu: float
    notebook_loss: float
    ours_loss: float
    notebook_peak_mb: float
    ours_peak_mb: float
    """Of the largest worker."""
    ours_peak_sum_mb: float
    """At most this much in all workers together."""
    notebook_share: float
    """Processor seconds over wall-clock and threads: well below 1, other work on the machine disturbed the run, and the
    notebook's two threads, which wait for each other, suffer more from it than our two processes."""


def measure(units: list[Weights], threads: int) -> tuple[Round, list[Outcome], list[Outcome]]:
    """One run of both. Each side has processes of its own, so that neither's peak memory counts for the other."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, start_worker, (threads,)) as pool:
        list(pool.map(ready, range(1)))
        theirs = list(pool.map(run_notebook, units))

    largest_first = sorted(units, key=lambda unit: -unit.work)
    with ProcessPoolExecutor(threads, spawn, start_worker, (1,)) as pool:
        list(pool.map(ready, range(threads)))
        start = time.perf_counter()
        ours = list(pool.map(run_ours, largest_first))
        whole = time.perf_counter() - start
    with ProcessPoolExecutor(threads, spawn, start_worker, (1,)) as pool:
        list(pool.map(ready, range(threads)))
        start = time.perf_counter()
        list(pool.map(run_our_spectral, largest_first))
        spectral = time.perf_counter() - start

    # Outcomes do not say from which worker they come: the largest peaks, one per worker, bound their sum from above.
    peaks = sorted((outcome.peak_mb for outcome in ours), reverse=True)[:threads]
    figures = Round(
        notebook_spectral=sum(outcome.spectral for outcome in theirs),
        notebook_whole=sum(outcome.whole for outcome in theirs),
        ours_spectral=spectral,
        ours_whole=whole,
        ours_yardsticks=sum(outcome.yardsticks for outcome in ours) / threads,
        notebook_cpu=sum(outcome.cpu for outcome in theirs),
        ours_cpu=sum(outcome.cpu for outcome in ours),
        notebook_loss=statistics.mean(outcome.loss for outcome in theirs),
        ours_loss=statistics.mean(outcome.loss for outcome in ours),
        notebook_peak_mb=max(outcome.peak_mb for outcome in theirs),
        ours_peak_mb=peaks[0],
        ours_peak_sum_mb=sum(peaks),
        notebook_share=sum(o.cpu for o in theirs) / sum(o.whole for o in theirs) / threads,
    )
    return figures, theirs, ours


def report(rounds: list[Round]) -> dict[str, float]:
    """Medians over runs, and ratios within each run, of which the median: noise of a shared machine hits both sides."""
    medians = {name: statistics.median(asdict(one)[name] for one in rounds) for name in asdict(rounds[0])}
    medians["spectral_ratio"] = statistics.median(one.notebook_spectral / one.ours_spectral for one in rounds)
    medians["whole_ratio"] = statistics.median(one.notebook_whole / one.ours_whole for one in rounds)
    medians["cpu_ratio"] = statistics.median(one.notebook_cpu / one.ours_cpu for one in rounds)
    medians["loss_ratio"] = statistics.median(one.ours_loss / one.notebook_loss for one in rounds)
    print(f"{'median of ' + str(len(rounds)) + ' runs':28}{'notebook':>12}{'ours':>12}{'ratio':>9}")
    for label, key in (("spectral step, s", "spectral"), ("whole, s", "whole"), ("whole, processor s", "cpu")):
        theirs, ours = medians[f"notebook_{key}"], medians[f"ours_{key}"]
        print(f"{label:28}{theirs:12.2f}{ours:12.2f}{medians[f'{key}_ratio']:8.1f}×")
    print(f"{'whole: yardsticks in it, s':28}{'–':>12}{medians['ours_yardsticks']:12.2f}")
    print(f"{'final fit loss':28}{medians['notebook_loss']:12.3e}{medians['ours_loss']:12.3e}")
    print(f"{'peak MB, largest process':28}{medians['notebook_peak_mb']:12.0f}{medians['ours_peak_mb']:12.0f}")
    print(f"{'peak MB, all processes':28}{medians['notebook_peak_mb']:12.0f}{medians['ours_peak_sum_mb']:12.0f}")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ff", type=int, default=1408)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        units = make_weights(folder, options.layers, options.d_model, options.d_ff)
        measured = []
        for number in range(options.runs):
            measured.append(measure(units, options.threads))
            one = measured[-1][0]
            print(
                f"run {number + 1}: spectral {one.notebook_spectral:.2f} / {one.ours_spectral:.2f} s, whole "
                f"{one.notebook_whole:.2f} / {one.ours_whole:.2f} s; notebook got {one.notebook_share:.0%} of its CPU",
                flush=True,
            )
    medians = report([figures for figures, _, _ in measured])
    if options.json:
        runs = [
            {"figures": asdict(figures), "notebook": [asdict(o) for o in theirs], "ours": [asdict(o) for o in ours]}
            for figures, theirs, ours in measured
        ]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "medians": medians, "runs": runs}, file, indent=1)


if __name__ == "__main__":
    main()
