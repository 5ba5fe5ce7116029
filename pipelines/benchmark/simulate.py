"""What LESA takes on models and clusters that are not at hand, and how far off such predictions are on what is.

    python -m pipelines.benchmark.simulate                     # 8B, 32B, 70B and 405B on the clusters of simulate.yaml
    python -m pipelines.benchmark.simulate --check --runs 5    # predictions against runs made here, some minutes

The models exist as shapes alone: a sparse file with a real safetensors header and no data, which takes no room on disk,
so that the prediction goes the way of `lesa-ray inspect`.

`--check` first measures this machine's rates in a few seconds (products, eigh, a step of the predictor, memory, the
disk), then expands small bfloat16 checkpoints in this process, one core, units one after the other, and compares each
unit's phases and its peak memory with what `lesa_ray.lesa.cost` says. Rates are measured at one size and used at all:
that is part of the error. Files are in the page cache, so the disk's rate is that of memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table

from lesa_ray.config import ExpandConfig, LesaSettings, Settings, load_settings
from lesa_ray.distributed.expand import expand
from lesa_ray.expansion.cluster_spec import ClusterSpec
from lesa_ray.expansion.estimate import Estimate, estimate
from lesa_ray.expansion.memory import INTERPRETER_BYTES
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.lesa.predictor import Predictor, train
from lesa_ray.lesa.rates import Rates
from lesa_ray.lesa.report import FitReport
from lesa_ray.report.console import Console
from lesa_ray.report.estimate import cluster_line, unit_table
from lesa_ray.report.terminal import duration
from lesa_ray.sizes import size

SETTINGS = Path(__file__).with_suffix(".yaml")
console = Console(width=160)


class Model(Settings):
    """A Llama-like model by its widths; `bias` as in Qwen2, on queries, keys and values."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    bias: bool = False
    tied: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        d, wide, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "mlp.gate_proj.weight": (wide, d),
            "mlp.up_proj.weight": (wide, d),
            "mlp.down_proj.weight": (d, wide),
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
        }
        if self.bias:
            layer |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", q), ("k", kv), ("v", kv))}
        shapes = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        ends: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, d),
            "model.norm.weight": (d,),
        }
        return shapes | ends | ({} if self.tied else {"lm_head.weight": (self.vocabulary, d)})

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "model_type": "qwen2" if self.bias else "llama",
            "architectures": ["Qwen2ForCausalLM" if self.bias else "LlamaForCausalLM"],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }


class Simulation(Settings):
    """What simulate.yaml holds."""

    factor: float
    lesa: LesaSettings = LesaSettings()
    models: dict[str, Model]
    clusters: dict[str, ClusterSpec]


def write_shapes(model: Model, folder: Path) -> None:
    """A checkpoint of bfloat16 tensors without their data: config.json and one sparse file."""
    header, at = {}, 0
    for name, shape in model.shapes().items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(model.config()))


def predict(model: Model, cluster: ClusterSpec, settings: Simulation) -> Estimate:
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(model, Path(folder))
        config = ExpandConfig(base=folder, out=f"{folder}/out", factor=settings.factor, lesa=settings.lesa)
        return estimate(prepare(config), cluster)


def simulate(settings: Simulation, units: bool) -> list[dict[str, Any]]:
    """Predict each model on each cluster, and print a table; with `units` one for each prediction too."""
    rows = []
    table = Table(title=f"LESA, {settings.factor:g} × the layers", title_justify="left")
    for column in ("model", "cluster", "units", "assembly", "read", "written", "process", "node", "GPU", "fits"):
        table.add_column(column, justify="left" if column in ("model", "cluster", "fits") else "right")
    for model_name, model in settings.models.items():
        for cluster_name, cluster in settings.clusters.items():
            need = predict(model, cluster, settings)
            rows.append({"model": model_name, "on": cluster_name, **need.to_dict()})
            table.add_row(
                model_name,
                cluster_name,
                duration(need.unit_seconds),
                duration(need.assembly_seconds),
                size(need.read_bytes),
                size(need.written_bytes),
                size(need.memory),
                size(need.node_memory),
                size(need.device_memory) if need.device_memory else "–",
                "yes" if need.short_of is None else f"no: {need.short_of}",
            )
            if units:
                console.print(f"\n{model_name} on {cluster_name}: {cluster_line(cluster)}")
                console.print(unit_table(need))
    for name, cluster in settings.clusters.items():
        console.print(f"{name}: {cluster_line(cluster)}")
    console.print(table)
    return rows


def typical(call: Callable[[], object], times: int = 5) -> float:
    """Seconds of a call: the middle of a few, after one that does not count."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_rates(hidden: int = 256, batch: int = 64) -> Rates:
    """This machine's rates for one thread, in a few seconds. No GPU."""
    single, double = torch.randn(768, 768), torch.randn(768, 768, dtype=torch.float64)
    symmetric = double @ double.T
    large = torch.randn(8 * 2**20)
    used = torch.empty_like(large)
    fresh, again = typical(large.clone), typical(lambda: used.copy_(large))

    def step(d2: int) -> float:
        rows = torch.randn(3, 32 * batch, d2)
        network = Predictor(d2, hidden, torch.float32, "cpu", 0)
        one = LesaSettings(epochs=1, hidden=hidden, batch_size=batch)
        return typical(lambda: train(network, rows, [1], one, 0)) / 32

    small, big = 128, 768
    quick, slow = step(small), step(big)
    narrow = batch * hidden * 14 * (big - small) / max(slow - quick, 1e-6)
    product = 2 * 768**3 / typical(lambda: single @ single)
    eigh = 9 * 768**3 / typical(lambda: torch.linalg.eigh(symmetric))
    return Rates(
        half=product,
        fp32=product,
        fp64=2 * 768**3 / typical(lambda: double @ double),
        eigh=eigh,
        eigh_host=eigh,
        narrow=narrow,
        step=max(quick - batch * hidden * (14 * small + 6 * hidden) / narrow, 0.0),
        memory=2 * (2 * large.nbytes) / (fresh + again),
        bus=float("inf"),
    )


def measure_disk(folder: str) -> float:
    """Bytes a second through the page cache, the slower of writing and reading 64 MB."""
    path, data = os.path.join(folder, "probe"), torch.zeros(64 * 2**20, dtype=torch.uint8).numpy().tobytes()
    buffer = bytearray(len(data))

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(data)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(buffer)

    seconds = max(typical(write), typical(read))
    os.unlink(path)
    return len(data) / seconds


def middle(one: Rates, other: Rates) -> Rates:
    """What lies between two measurements of rates: others use this machine too."""
    return Rates(**{name: (value + getattr(other, name)) / 2 for name, value in asdict(one).items()})


@dataclass(frozen=True)
class Measured:
    """One unit of a real run: seconds by phase, and by how much the process grew, in bytes."""

    seconds: dict[str, float]
    memory: int


@dataclass(frozen=True)
class Run:
    """A real expansion: seconds of the whole, the share of them in which this process had a core, and its units."""

    seconds: float
    share: float
    units: dict[str, Measured]


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def run_once(config: ExpandConfig) -> Run:
    """Expand in this process. Linux alone tells the memory."""
    order = [unit.name for unit in prepare(config).units]
    found: list[Measured] = []
    real = FitReport.to_dict
    before = 0

    def begin() -> None:
        nonlocal before
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the unit before left behind is not this one's
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = resident("VmRSS:")

    def watched(report: FitReport) -> Any:
        """A unit has ended, and the next one begins."""
        found.append(Measured(report.seconds, resident("VmHWM:") - before))
        begin()
        return real(report)

    begin()
    start, cpu = time.perf_counter(), time.process_time()
    with mock.patch.object(FitReport, "to_dict", watched):
        expand(config, runner=InlineRunner())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Run(seconds, cpu / seconds, dict(zip(order, found, strict=False)))  # the vectors' unit is not LESA's


CHECKED = {
    "256 × 6": Model(layers=6, hidden=256, intermediate=704, heads=2, kv_heads=1, vocabulary=512),
    "512 × 10": Model(layers=10, hidden=512, intermediate=1408, heads=4, kv_heads=2, vocabulary=512),
    "768 × 12": Model(layers=12, hidden=768, intermediate=2048, heads=6, kv_heads=2, vocabulary=512),
}
"""Models of the check, small enough for seconds on one core."""


def write_weights(model: Model, folder: Path) -> None:
    """The same files with random weights in them."""
    write_shapes(model, folder)
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in model.shapes().items()
    }
    save_file(tensors, str(folder / "model.safetensors"))


def off(predicted: float, measured: float) -> str:
    """The error of a prediction."""
    return f"{predicted / measured - 1:+.0%}" if measured > 0 else "–"


def check(models: dict[str, Model], runs: int, lesa: LesaSettings) -> list[dict[str, Any]]:
    """Predict and run, print both, phase by phase; medians of `runs`, rates measured before and after each run."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        rounds = []
        with tempfile.TemporaryDirectory() as folder:
            write_weights(model, Path(folder) / "base")
            for number in range(runs + 1):  # the first warms up libraries and the page cache
                config = ExpandConfig(base=f"{folder}/base", out=f"{folder}/out-{number}", factor=1.5, lesa=lesa)
                before, disk = measure_rates(lesa.hidden, lesa.batch_size), measure_disk(folder)
                run = run_once(config)
                rates = middle(before, measure_rates(lesa.hidden, lesa.batch_size))
                spec = ClusterSpec(cpus_per_node=1, memory_per_node=2**40, storage_per_node=int(disk))
                rounds.append((estimate(prepare(config), spec, rates), run))
        rows.append(compare(name, rounds[1:]))
    return rows


def compare(name: str, rounds: list[tuple[Estimate, Run]]) -> dict[str, Any]:
    """Print predicted beside measured for one model; medians over the rounds."""
    first = rounds[0][0]
    phases = list(dict.fromkeys(phase for unit in first.units for phase in unit.seconds))
    share = statistics.median(run.share for _, run in rounds)
    console.print(f"{name}: seconds of all units on one core, of which the runs had {share:.0%}")
    table = Table()
    for column in ("phase", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    seconds: dict[str, tuple[float, float]] = {}
    for phase in phases:
        told = statistics.median(sum(unit.seconds.get(phase, 0.0) for unit in need.units) for need, _ in rounds)
        took = statistics.median(sum(u.seconds.get(phase, 0.0) for u in run.units.values()) for _, run in rounds)
        seconds[phase] = told, took
    seconds["all of it"] = (
        statistics.median(need.seconds for need, _ in rounds),
        statistics.median(run.seconds for _, run in rounds),
    )
    for phase, (told, took) in seconds.items():
        table.add_row(phase, f"{told:.3f}", f"{took:.3f}", off(told, took))
    console.print(table)

    memory: dict[str, tuple[int, int]] = {}
    for unit in first.units:
        if unit.name in rounds[0][1].units:
            grown = max(run.units[unit.name].memory for _, run in rounds)
            memory[unit.name] = unit.host_memory - INTERPRETER_BYTES, grown
    largest = max(memory, key=lambda unit: memory[unit][0])
    told_bytes, took_bytes = memory[largest]
    console.print(
        f"peak memory of the largest unit ({largest}) beside the interpreter: predicted {size(told_bytes)}, "
        f"measured {size(took_bytes)} ({off(told_bytes, took_bytes)})\n"
    )
    return {
        "model": name,
        "processor_share": share,
        "seconds": {phase: {"predicted": told, "measured": took} for phase, (told, took) in seconds.items()},
        "memory": {unit: {"predicted": told, "measured": took} for unit, (told, took) in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(SETTINGS), help="models and clusters, YAML")
    parser.add_argument("--units", action="store_true", help="print every unit too")
    parser.add_argument("--check", action="store_true", help="predict what can be run here, run it, compare")
    parser.add_argument("--runs", type=int, default=3, help="runs of each model of the check")
    parser.add_argument("--json", help="where to write all figures")
    options = parser.parse_args()
    settings = load_settings(Simulation, options.config)
    rows = check(CHECKED, options.runs, settings.lesa) if options.check else simulate(settings, options.units)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
