"""Benchmark: the copying methods against `cp` of as many bytes, and against mergekit's passthrough where it is given.

    python -m pipelines.benchmark.copying [--folder DIR] [--runs 5] [--mergekit PATH/TO/mergekit-yaml]

The base is a synthetic bfloat16 Llama of 2.3 GB (24 layers, d=2048, d_ff=5632, vocabulary 32,000), written tensor by
tensor. Each way makes 36 layers of it, in turn: ours (a fresh process, start-up included), mergekit's (SOLAR slices,
the same result) and `cp` of ours with a sync of the file. Wall-clock medians, the largest process's resident memory,
and ratios are printed."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lesa_ray.checkpoint.shards import OutTensor, header_bytes
from lesa_ray.checkpoint.storage import Storage

LAYERS, GROWN, D_MODEL, D_FF, VOCABULARY = 24, 36, 2048, 5632, 32_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass
class Runs:
    """Wall-clock seconds and largest process's bytes of several runs of one way."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def make_base(folder: str) -> None:
    """Write the base, one tensor in memory at a time; kept if it is there."""
    storage = Storage(folder)
    if storage.exists("config.json"):
        return
    kv = D_MODEL // 4
    layer = {
        "self_attn.q_proj": (D_MODEL, D_MODEL),
        "self_attn.k_proj": (kv, D_MODEL),
        "self_attn.v_proj": (kv, D_MODEL),
        "self_attn.o_proj": (D_MODEL, D_MODEL),
        "mlp.gate_proj": (D_FF, D_MODEL),
        "mlp.up_proj": (D_FF, D_MODEL),
        "mlp.down_proj": (D_MODEL, D_FF),
        "input_layernorm": (D_MODEL,),
        "post_attention_layernorm": (D_MODEL,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, D_MODEL)}
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (D_MODEL,), "lm_head.weight": (VOCABULARY, D_MODEL)}
    tensors = tuple(OutTensor(name, "BF16", shape, None) for name, shape in shapes.items())
    random = np.random.default_rng(0)
    with storage.create("model.safetensors") as file:
        file.write(header_bytes(tensors))
        for tensor in tensors:
            values = random.standard_normal(tensor.shape, dtype=np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    storage.write("config.json", json.dumps(CONFIG).encode())


def timed(command: list[str], runs: Runs) -> None:
    """Run a command to its end in a process of its own and add what it took. Raises: CalledProcessError."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, command, stderr=message)
    runs.seconds.append(time.monotonic() - start)
    runs.memory.append(usage.ru_maxrss * 1024)


def copied(source: str, target: str, runs: Runs) -> None:
    """Copy a folder with `cp` and sync the files: what the disk takes for the bytes written."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    for name in os.listdir(target):
        descriptor = os.open(os.path.join(target, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    runs.seconds.append(time.monotonic() - start)


def start_up(command: list[str]) -> float:
    """Seconds of a command that copies nothing: what no way of copying can save."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


OURS = [sys.executable, "-m", "lesa_ray.cli"]
IMPORTS = "import transformers.models.llama.modeling_llama"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "lesa-ray-benchmark"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment that has mergekit")
    arguments = parser.parse_args()
    base, out = (os.path.join(arguments.folder, name) for name in ("base", "out"))
    # in a process of its own: what a parent held once counts in the peak memory of its children
    maker = multiprocessing.get_context("spawn").Process(target=make_base, args=(base,))
    maker.start()
    maker.join()

    ways: dict[str, Callable[[Runs], None]] = {
        "solar": lambda runs: timed([*OURS, "expand", base, out, "--method", "solar"], runs),
        "cp": lambda runs: copied(f"{out}-kept", out, runs),
        "llama-pro": lambda runs: timed([*OURS, "expand", base, out, "--method", "llama-pro"], runs),
    }
    if arguments.mergekit:
        recipe = os.path.join(arguments.folder, "solar.yaml")
        overlap = GROWN // 2
        slices = [{"sources": [{"model": base, "layer_range": r}]} for r in ([0, overlap], [LAYERS - overlap, LAYERS])]
        with open(recipe, "w", encoding="utf-8") as file:
            json.dump({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}, file)
        ways["mergekit passthrough"] = lambda runs: timed(
            [arguments.mergekit, recipe, out, "--no-copy-tokenizer"], runs
        )

    results = {name: Runs() for name in ways}
    shutil.rmtree(f"{out}-kept", ignore_errors=True)
    timed([*OURS, "expand", base, f"{out}-kept", "--method", "solar"], Runs())
    plans = [start_up([*OURS, "inspect", base, "--method", "solar", "--json"]) for _ in range(arguments.runs)]
    imports = [start_up([sys.executable, "-c", IMPORTS]) for _ in range(arguments.runs)]
    for _ in range(arguments.runs):
        for name, way in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            way(results[name])
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}-kept", ignore_errors=True)

    cp = statistics.median(results["cp"].seconds)
    print(f"{arguments.runs} runs, medians. Start-up: lesa-ray to its finished plan {statistics.median(plans):.2f} s;")
    print(f"transformers with its Llama, on which llama-pro tries itself, {statistics.median(imports):.2f} s")
    print(f"{'way':24}{'seconds':>10}{'min':>8}{'max':>8}{'of cp':>8}{'memory':>12}")
    for name, runs in results.items():
        median = statistics.median(runs.seconds)
        memory = f"{statistics.median(runs.memory) / 1e6:.0f} MB" if runs.memory else "–"
        print(
            f"{name:24}{median:>10.2f}{min(runs.seconds):>8.2f}{max(runs.seconds):>8.2f}{median / cp:>8.2f}{memory:>12}"
        )


if __name__ == "__main__":
    main()
