"""How much faster than the released notebook: from a checkpoint to predicted tensors, on the same layers and settings.

    python -m pipelines.benchmark.notebook --layers 24 --d-model 1024 --d-ff 2816 --runs 5 --json out.json

The notebook's algorithm (github.com/yangyifei729/LESA, train_LESA.ipynb) is written anew here, plainly: load all
layers, concatenate, torch.linalg.svd in float32, build X and Y, TensorDataset and a shuffling DataLoader, AdamW for 10
epochs with λ = 5e-4, predict a new layer for each gap of the top half; one weight type after the other with all
threads, as released. Against it, `lesa_ray.lesa.fit_weight_type` with the same settings and rows, once with the network
and once with ridge regression in its place, the largest types first, in `--workers` processes that share the threads.
A fifth of the layer triples is kept from both, and the loss is of those.

Layers are random walks W_i = 0.8·W_{i−1} + 0.6·noise in bfloat16, in a safetensors file for each weight type; q, o are
(d, d), k and v (d_kv, d), gate and up (d_ff, d), down (d, d_ff). With `--device cuda` both compute there. Neither time
holds the start of processes, the import of torch or the writing of results; ours with the network holds its yardsticks,
which the notebook lacks, and their share is printed. Runs take turns; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lesa_ray.config import LesaSettings
from lesa_ray.expansion.memory import return_freed_memory
from lesa_ray.expansion.runner import own_peak_memory
from lesa_ray.lesa.fit import fit_weight_type, split_triples
from lesa_ray.lesa.spectral import decompose
from pipelines.benchmark.layers import Weights

SEED = 0
EPOCHS, ROWS_A_STEP = 10, 64
RELEASED = LesaSettings.from_recipe("released-code", holdout=0.2)
RIDGE = RELEASED.model_copy(update={"predictor": "ridge"})
SPECTRAL = ("load", "gram", "eigh", "project")


@dataclass(frozen=True)
class Outcome:
    """What one weight type took, and the loss at which its predictor ended."""

    name: str
    seconds: dict[str, float]
    """Wall-clock by phase; `whole` is all of them."""
    loss: float
    """Of the fitted predictor over the held-out triples, in batches of 64 rows in order."""
    cpu: float
    """Processor seconds of the whole, all threads: what a busy machine distorts least."""
    peak_mb: float
    """Peak resident memory of the process so far."""
    device_mb: float
    """Peak memory taken on the GPU."""

    @property
    def spectral(self) -> float:
        return sum(self.seconds.get(phase, 0.0) for phase in SPECTRAL)


def make_weights(folder: str, layers: int, d_model: int, d_ff: int, d_kv: int) -> list[Weights]:
    """Write the layers of the seven weight types of a Llama to `folder`."""
    shapes = {"q": (d_model, d_model), "o": (d_model, d_model), "k": (d_kv, d_model), "v": (d_kv, d_model)}
    shapes |= {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    made = [Weights(name, folder, layers, d1, d2) for name, (d1, d2) in shapes.items()]
    for seed, weights in enumerate(made):
        weights.write(seed)
    return made


def all_layers(weights: Weights) -> list[Tensor]:
    """As the notebook has them: all in memory, float32."""
    with safe_open(os.path.join(weights.folder, weights.file), "pt") as file:
        return [file.get_tensor(str(layer)).float() for layer in range(weights.layers)]


def work(weights: Weights) -> int:
    """Grows like the training time: rows × parameters."""
    return weights.d1 * (3 * weights.d2 + RELEASED.hidden) * RELEASED.hidden


def start_worker(threads: int, device: str) -> None:
    """Settle what is not to be measured: threads, and the first call of each library."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.linalg.svd(torch.randn(8, 8, device=device) @ torch.randn(8, 8, device=device))
    parameter = nn.Parameter(torch.zeros(2))
    torch.optim.AdamW([parameter])


def ready(_: int) -> int:
    time.sleep(0.2)  # long enough that every worker takes part
    return os.getpid()


def settled(device: str) -> float:
    """The time, once the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0


def training(x: Tensor, y: Tensor) -> tuple[nn.Module, Iterator[float]]:
    """The released network, and its training on rows x, (rows, 2·d2), and y, (rows, d2): each step's loss, as soon as
    the step is done, of all epochs."""
    d2 = y.shape[1]
    network = nn.Sequential(nn.Linear(2 * d2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, d2))
    network.to(y.device)
    criterion = nn.MSELoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001)
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=ROWS_A_STEP, shuffle=True)

    def steps() -> Iterator[float]:
        for _ in range(EPOCHS):
            for batch_x, batch_y in loader:
                optimizer.zero_grad()
                output = network(batch_x)
                norms = criterion(torch.norm(output, p=2), torch.norm(batch_y, p=2))
                loss = (1 - 0.0005) * criterion(output, batch_y) + 0.0005 * norms
                loss.backward()
                optimizer.step()
                yield loss.item()

    return network, steps()


def run_notebook(weights: Weights, device: str) -> Outcome:
    """The released algorithm for one weight type."""
    start, cpu = time.perf_counter(), time.process_time()
    layers = [layer.to(device) for layer in all_layers(weights)]
    concatenated = torch.cat(layers, dim=1)
    u, s, vt = torch.linalg.svd(concatenated, full_matrices=False)
    separate = [vt[:, i * weights.d2 : (i + 1) * weights.d2] for i in range(weights.layers)]
    spectral = settled(device) - start

    inner, held_out = split_triples(1, weights.layers, RELEASED.holdout, SEED)
    x = torch.cat([torch.cat([separate[i - 1], separate[i + 1]], dim=1) for i in inner])
    y = torch.cat([separate[i] for i in inner])
    network, steps = training(x, y)
    for _ in steps:
        pass
    with torch.no_grad():
        predicted = [network(torch.cat([separate[a], separate[b]], dim=1)) for _, a, b in weights.slots]
        rebuilt = [((u * s) @ one).cpu() for one in predicted]
    whole, cpu = settled(device) - start, time.process_time() - cpu

    assert len(rebuilt) == len(weights.slots)
    with torch.no_grad():
        losses = []
        for i in held_out:
            output = network(torch.cat([separate[i - 1], separate[i + 1]], dim=1))
            losses.append(fit_loss(output, separate[i]))
        final = statistics.mean(losses)
    seconds = {"gram": spectral, "train": whole - spectral, "whole": whole}
    return Outcome(weights.name, seconds, final, cpu, own_peak_memory() / 1e6, _device_peak(device))


def fit_loss(output: Tensor, target: Tensor) -> float:
    """The loss of one layer's rows, (rows, d2), norms over batches of 64."""
    gaps = [a.norm() - b.norm() for a, b in zip(torch.split(output, 64), torch.split(target, 64), strict=True)]
    norm = torch.stack(gaps).square().mean()
    return float((1 - 0.0005) * (output - target).square().mean() + 0.0005 * norm)


def run_ours(weights: Weights, device: str, settings: LesaSettings) -> Outcome:
    return_freed_memory()  # as every unit begins
    made: list[Tensor] = []
    start, cpu = time.perf_counter(), time.process_time()
    report = fit_weight_type(
        weights.load(),
        weights.layers,
        weights.slots,
        lambda _, weight: made.append(weight.bfloat16()),
        settings,
        seed=SEED,
        device=device,
    )
    whole, cpu = settled(device) - start, time.process_time() - cpu
    assert len(made) == len(weights.slots)
    assert report.held_out is not None
    loss = report.held_out["predictor"].loss
    seconds = {**report.seconds, "whole": whole}
    return Outcome(weights.name, seconds, loss, cpu, own_peak_memory() / 1e6, _device_peak(device))


def run_our_spectral(weights: Weights, device: str) -> str:
    return decompose([weights.load()], weights.layers, device=device).route


@dataclass(frozen=True)
class Side:
    """One way, all weight types."""

    spectral: float
    """Wall-clock seconds of the spectral step alone, reading included."""
    whole: float
    cpu: float
    loss: float
    """Mean over the types."""
    peak_mb: float
    """Largest process."""
    peak_sum_mb: float
    """At most this much in all processes together."""
    device_mb: float
    phases: dict[str, float]
    """Seconds by phase, summed over the types."""


@dataclass(frozen=True)
class Round:
    notebook: Side
    ours: Side
    ridge: Side
    notebook_share: float
    """Processor seconds over wall-clock and threads: well below 1, other work on the machine disturbed the run."""


def _side(outcomes: list[Outcome], whole: float, spectral: float, processes: int) -> Side:
    # Outcomes do not say from which worker they come: the largest peaks, one per worker, bound their sum from above.
    peaks = sorted((outcome.peak_mb for outcome in outcomes), reverse=True)[:processes]
    phases: dict[str, float] = {}
    for outcome in outcomes:
        for name, seconds in outcome.seconds.items():
            phases[name] = phases.get(name, 0.0) + seconds
    return Side(
        spectral=spectral,
        whole=whole,
        cpu=sum(outcome.cpu for outcome in outcomes),
        loss=statistics.mean(outcome.loss for outcome in outcomes),
        peak_mb=peaks[0],
        peak_sum_mb=sum(peaks),
        device_mb=max(outcome.device_mb for outcome in outcomes),
        phases=phases,
    )


def measure(units: list[Weights], threads: int, workers: int, device: str) -> Round:
    """One run of all. Each has processes of its own, so that none's peak memory counts for another."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, start_worker, (threads, device)) as pool:
        list(pool.map(ready, range(1)))
        theirs = list(pool.map(run_notebook, units, [device] * len(units)))
    largest_first = sorted(units, key=lambda unit: -work(unit))

    def ours(task: Callable[..., Any], *more: object) -> tuple[list[Any], float]:
        with ProcessPoolExecutor(workers, spawn, start_worker, (max(threads // workers, 1), device)) as pool:
            list(pool.map(ready, range(workers)))
            start = time.perf_counter()
            found = list(pool.map(task, largest_first, *([one] * len(units) for one in (device, *more))))
            return found, time.perf_counter() - start

    network, network_whole = ours(run_ours, RELEASED)
    ridge, ridge_whole = ours(run_ours, RIDGE)
    _, spectral = ours(run_our_spectral)
    cpu, wall = sum(o.cpu for o in theirs), sum(o.seconds["whole"] for o in theirs)
    return Round(
        notebook=_side(theirs, wall, sum(o.spectral for o in theirs), 1),
        ours=_side(network, network_whole, spectral, workers),
        ridge=_side(ridge, ridge_whole, spectral, workers),
        notebook_share=cpu / wall / threads,
    )


def report(rounds: list[Round]) -> dict[str, dict[str, float]]:
    """Medians over runs, and ratios within each run, of which the median: noise of a shared machine hits all sides."""

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(of(one) for one in rounds)

    figures: dict[str, dict[str, float]] = {}
    labels = {
        "spectral": "spectral step, s",
        "whole": "whole, s",
        "cpu": "whole, processor s",
        "loss": "loss, held-out triples",
        "peak_mb": "peak MB, largest process",
        "peak_sum_mb": "peak MB, all processes",
        "device_mb": "peak MB on the GPU",
    }
    ways = ("notebook", "ours", "ridge")
    print(f"{'median of ' + str(len(rounds)) + ' runs':26}{'notebook':>11}{'ours':>11}{'':9}{'with ridge':>11}")
    for key, label in labels.items():
        if key == "device_mb" and not rounds[0].notebook.device_mb:
            continue
        figures[key] = {way: median(lambda one, w=way, k=key: getattr(getattr(one, w), k)) for way in ways}  # type: ignore[misc]
        for way in ways[1:]:
            figures[key][f"{way}_ratio"] = median(
                lambda one, w=way, k=key: getattr(one.notebook, k) / getattr(getattr(one, w), k)  # type: ignore[misc]
            )
        row = figures[key]
        form = "11.3e" if key == "loss" else "11.2f" if row["ours"] < 1000 else "11.0f"
        print(
            f"{label:26}{row['notebook']:{form}}{row['ours']:{form}}{row['ours_ratio']:8.2f}×{row['ridge']:{form}}"
            f"{row['ridge_ratio']:8.2f}×"
        )
    phases = rounds[0].ours.phases
    whole = phases["whole"]
    print("ours by phase: " + ", ".join(f"{name} {phases[name] / whole:.0%}" for name in phases if name != "whole"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-ff", type=int, default=2816)
    parser.add_argument("--d-kv", type=int, help="rows of k and v; d-model if not given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        d_kv = options.d_kv or options.d_model
        units = make_weights(folder, options.layers, options.d_model, options.d_ff, d_kv)
        rounds = []
        for number in range(options.runs):
            one = measure(units, options.threads, options.workers, options.device)
            rounds.append(one)
            print(
                f"run {number + 1}: spectral {one.notebook.spectral:.2f} / {one.ours.spectral:.2f} s, whole "
                f"{one.notebook.whole:.2f} / {one.ours.whole:.2f} / {one.ridge.whole:.2f} s (ridge); notebook got "
                f"{one.notebook_share:.0%} of its CPU",
                flush=True,
            )
    figures = report(rounds)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            runs = [asdict(one) for one in rounds]
            json.dump({"options": vars(options), "medians": figures, "runs": runs}, file, indent=1)


if __name__ == "__main__":
    main()
