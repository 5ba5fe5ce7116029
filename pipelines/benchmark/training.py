"""What a step costs beside a plain hand-written FSDP2 loop, and what freezing gains.

    python -m pipelines.benchmark.training

The same Llama, the same rows, float32 (bfloat16 on GPUs), two gloo workers (one process a GPU), in one run:

    by hand         fully_shard on each layer and the root, AdamW, clipping; rows ready in memory, nothing recorded
    ours            `lesa_ray.training`: rows from token blocks, metrics to JSON Lines and TensorBoard, losses looked at
    ours, upper     the same with the lower half of the layers, the embedding, norm and head frozen

Rounds of some steps of each take turns, so that what else the machine does falls on all; shown are medians over rounds.
Ray is left out: it starts workers and is not there while they train.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.table import Table
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.report.console import Console
from lesa_ray.training.batches import step_rows
from lesa_ray.training.flops import peak_flops
from lesa_ray.training.loop import Loop, Trainer
from lesa_ray.training.metrics import MetricsLog
from lesa_ray.training.run import Run, prepare
from lesa_ray.training.tokens import MANIFEST, content_digest, rows_per_group, write_rows
from lesa_ray.training.train_settings import TrainConfig
from lesa_ray.training.worker import set_up

console = Console(soft_wrap=True, highlight=False)
HAND, OURS, UPPER = "by hand", "ours", "ours, lower half frozen"
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 4096},
    # Llama-3.2-1B's shapes
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip


def make_inputs(folder: str, size: str, seq_len: int, rows: int) -> None:
    """A random checkpoint and random token blocks."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=seq_len, dtype="float32")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(os.path.join(folder, "base"))
    storage = Storage(os.path.join(folder, "blocks"))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len), dtype=np.int32)
    group = rows_per_group(seq_len)
    groups = [{"input_ids": ids[at : at + group]} for at in range(0, rows, group)]
    record = write_rows(storage, "train/part-00000.parquet", "text", seq_len, groups)
    splits = {
        "train": {"rows": rows, "tokens": ids.size, "files": [record]},
        "heldout": {"rows": 0, "tokens": 0, "files": []},
    }
    manifest = {
        "format": 1,
        "kind": "text",
        "seq_len": seq_len,
        "vocab_size": config.vocab_size,
        "rows_per_group": group,
        "digest": content_digest("text", seq_len, [record]),
        "splits": splits,
    }
    storage.write(MANIFEST, json.dumps(manifest).encode())


class Hand:
    """The plain loop, as one would write it for this model alone."""

    def __init__(self, run: Run, device: torch.device) -> None:
        config, workers = run.config, dist.get_world_size()
        assert config.checkpoint is not None
        model = AutoModelForCausalLM.from_pretrained(config.checkpoint, dtype=torch.float32, use_cache=False).to(device)
        compute = torch.bfloat16 if run.bf16 else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (workers,))
        for layer in model.model.layers:
            if config.compile:
                layer.compile()
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self.model, self.device, self.clip = model.train(), device, config.clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
        split, each = run.blocks.train, config.batch // workers
        own = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
        order = [step_rows(s, config.batch, split.rows, run.blocks.rows_per_group, config.seed)[own] for s in range(16)]
        self.batches = [torch.from_numpy(split.read(rows)["input_ids"].astype(np.int64)).to(device) for rows in order]
        self.micro = config.micro_batch or each

    def steps(self, first: int, count: int) -> None:
        losses = []
        for step in range(first, first + count):
            total = torch.zeros((), device=self.device)
            micros = torch.split(self.batches[step % len(self.batches)], self.micro)
            for ids in micros:
                logits = self.model(input_ids=ids).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()) / len(micros)
                torch.autograd.backward(loss)
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(total)
        window = torch.stack(losses)
        dist.all_reduce(window)
        window.tolist()


class NoSaver:
    """Checkpoints are another matter."""

    def save(self, *_: Any) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...


class Ours:
    """The trainer's own loop, from some step on for some steps."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run = run
        self.trainer, _, self.flops = set_up(run, device, fresh=True)
        out = run.config.out
        self.metrics = MetricsLog(out, (), 0, "benchmark", {}) if dist.get_rank() == 0 else None

    def steps(self, first: int, count: int) -> None:
        trainer: Trainer = self.trainer
        trainer.steps = first + count
        saver: Any = NoSaver()
        Loop(trainer, self.run.blocks, saver, self.metrics, lambda _: None, self.flops, None).run(first)


def worker(rank: int, folder: str, settings: dict[str, Any], rounds: int, steps: int, cuda: bool) -> None:
    """Time all ways in this process; rank 0 writes the seconds of a step, by way and round."""
    workers = settings["workers"]
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    store = FileStore(os.path.join(folder, "store"), workers)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=workers)
    whole = prepare(TrainConfig.model_validate(settings | {"train": "all"}), gpus=cuda)
    depth = whole.architecture["num_hidden_layers"]
    upper = tuple(f"*.layers.{index}.*" for index in range(depth // 2, depth))
    half = prepare(
        TrainConfig.model_validate(settings | {"train": upper, "out": f"{settings['out']}-upper"}), gpus=cuda
    )
    hand, ours, upper_half = Hand(whole, device), Ours(whole, device), Ours(half, device)
    ways: dict[str, Callable[[int, int], None]] = {HAND: hand.steps, OURS: ours.steps, UPPER: upper_half.steps}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, go in ways.items():
            dist.barrier()
            begun = time.perf_counter()
            go(turn * steps, steps)
            if cuda:
                torch.cuda.synchronize()
            dist.barrier()
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - begun) / steps)
    if rank == 0:
        peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16) if cuda else None
        flops = {OURS: ours.flops, UPPER: upper_half.flops}
        with open(os.path.join(folder, "seconds.json"), "w", encoding="utf-8") as file:
            json.dump({"seconds": seconds, "flops": flops, "peak": peak}, file)
    dist.barrier()
    dist.destroy_process_group()


def main(
    size: Annotated[str, typer.Option(help="small, or 1b (Llama-3.2-1B's shapes, for a GPU).")] = "small",
    workers: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a round.")] = 10,
    seq_len: Annotated[int, typer.Option(min=2)] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    micro_batch: Annotated[int | None, typer.Option(min=1)] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile each layer, both ways.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="On GPUs, in bfloat16.")] = False,
) -> None:
    """Time a training step beside a plain FSDP2 loop, and with the lower half frozen."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size}: choose {' or '.join(SIZES)}")
    with tempfile.TemporaryDirectory(prefix="lesa-ray-benchmark-") as folder:
        make_inputs(folder, size, seq_len, max(64, 16 * batch))
        settings = {
            "checkpoint": os.path.join(folder, "base"),
            "data": os.path.join(folder, "blocks"),
            "out": os.path.join(folder, "out"),
            "steps": (rounds + 1) * steps,
            "batch": batch,
            "micro_batch": micro_batch,
            "workers": workers,
            "schedule": "constant",
            "warmup": 0,
            "eval_rows": 0,
            "log_every": steps,
            "compile": compiled,
            "precision": "bf16" if cuda else "fp32",
        }
        spawn(worker, (folder, settings, rounds, steps, cuda), workers)  # type: ignore[no-untyped-call]
        with open(os.path.join(folder, "seconds.json"), encoding="utf-8") as file:
            found = json.load(file)
    console.print(table(found, seq_len * batch, workers))


def table(found: dict[str, Any], tokens: int, workers: int) -> Table:
    """Medians and ratios."""
    shown = Table(title=f"{tokens:,} tokens a step, {workers} workers, median of {len(found['seconds'][HAND])} rounds")
    for name in ("", "s/step", "tokens/s", "of by hand", "gain by freezing", *(["MFU"] if found["peak"] else [])):
        shown.add_column(name, justify="right" if name else "left")
    middle = {name: statistics.median(values) for name, values in found["seconds"].items()}
    pairs = zip(found["seconds"][OURS], found["seconds"][HAND], strict=True)
    ratio = statistics.median(ours / hand for ours, hand in pairs)
    halves = zip(found["seconds"][OURS], found["seconds"][UPPER], strict=True)
    gain = statistics.median(ours / upper for ours, upper in halves)
    notes = {HAND: ("1.00×", ""), OURS: (f"{ratio:.2f}×", "1.00×"), UPPER: ("", f"{gain:.2f}×")}
    for name, seconds in middle.items():
        mfu = []
        if found["peak"]:
            flops = found["flops"].get(name, found["flops"][OURS])
            mfu = [f"{100 * flops / seconds / found['peak'] / workers:.1f} %"]
        shown.add_row(name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", *notes[name], *mfu)
    return shown


if __name__ == "__main__":
    typer.run(main)
