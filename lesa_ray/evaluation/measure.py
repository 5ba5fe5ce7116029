"""Measure one checkpoint: fetch it, load it once, score the data, run the tasks.

    the tasks' data ▸ room on the GPU ▸ copy, if behind a URL ▸ tokenizer ▸ model ▸ windows of the data ▸ tasks

It runs in a plain process; `lesa_ray/distributed/evaluate.py` runs it for several checkpoints at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lesa_ray.errors import MachineError, UserError
from lesa_ray.evaluation.checkpoints import (
    Bounds,
    load_model,
    load_tokenizer,
    local_folder,
    no_tokenizer,
)
from lesa_ray.evaluation.data import BlockData, TextData, block_rows, text_rows
from lesa_ray.evaluation.paired import ratio
from lesa_ray.evaluation.perplexity import LONGEST_WINDOW, Scores, exp, fitting_batch, score
from lesa_ray.evaluation.placement import choose_devices, place
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.runner import own_peak_memory
from lesa_ray.faults import explain, is_fault
from lesa_ray.gpu import is_full

Progress = Callable[[str, float], None]
"""Is called with what is under way and the share of the data that is done."""


@dataclass(frozen=True)
class Job:
    """What to do with each checkpoint. `window` and `stride` are decided for all of them (0 without data)."""

    config: EvaluateConfig
    data: TextData | BlockData | None
    window: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one checkpoint gave: its part of the report, and its losses for comparing."""

    record: dict[str, Any]
    scores: Scores | None


def make_job(config: EvaluateConfig, data: TextData | BlockData | None, bounds: list[Bounds]) -> Job:
    """Decide windows that suit all checkpoints. Raises: UserError naming the checkpoint that they do not suit."""
    needs_tokenizer = bool(config.tasks) or isinstance(data, TextData)
    for bound in bounds:
        if needs_tokenizer and bound.has_tokenizer is False:
            raise no_tokenizer(bound.name)
        if isinstance(data, BlockData) and data.largest_id >= bound.vocab_size:
            raise UserError(
                f"checkpoint {bound.name}: its vocabulary has {bound.vocab_size} tokens, the token blocks "
                f"{data.name} go up to id {data.largest_id}; they were made with another tokenizer"
            )
        if config.window is not None and bound.positions is not None and config.window > bound.positions:
            raise UserError(
                f"window {config.window}: checkpoint {bound.name} was made for {bound.positions} positions; give at "
                "most that"
            )
    if data is None:
        return Job(config, None)
    longest = data.split.seq_len if isinstance(data, BlockData) else LONGEST_WINDOW
    window = config.window or min([longest, *(bound.positions for bound in bounds if bound.positions is not None)])
    stride = config.stride or window
    if stride > window:
        raise UserError(f"stride {stride}: is longer than the window ({window}), so tokens would be left out")
    return Job(config, data, window, stride)


def measure(job: Job, bound: Bounds, progress: Progress = lambda phase, share: None) -> Outcome:
    """All figures of one checkpoint. Raises: UserError naming it; MachineError."""
    begin = time.monotonic()
    devices = choose_devices(job.config.device, job.config.gpus_per_task)
    on_gpu = devices[0] != "cpu"
    for device in devices if on_gpu else ():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        record, scores = _figures(job, bound, devices, progress)
    except (UserError, MachineError):
        raise
    except Exception as error:
        if is_full(error):
            raise UserError(
                f"checkpoint {bound.name}: does not fit into the GPU's memory with this batch; give a smaller "
                f"--batch-size, a shorter --window, --dtype bfloat16 or --gpus-per-task {len(devices) + 1}"
            ) from error
        if is_fault(error):
            raise MachineError(f"checkpoint {bound.name}: {explain(error)[:300]}") from error
        raise UserError(f"checkpoint {bound.name}: cannot be measured ({explain(error)[:300]})") from error
    record |= {"seconds": time.monotonic() - begin, "peak_memory": own_peak_memory()}
    if on_gpu:  # of several the fullest
        record["peak_gpu_memory"] = max(torch.cuda.max_memory_allocated(device) for device in devices)
    return Outcome(record, scores)


def _figures(
    job: Job, bound: Bounds, devices: tuple[str, ...], progress: Progress
) -> tuple[dict[str, Any], Scores | None]:
    config, checkpoint, scores = job.config, bound.name, None
    tasks: list[Any] = []
    if config.tasks:
        from lesa_ray.evaluation.harness import load_tasks, run_tasks

        progress("reading the tasks", 0.0)
        tasks = load_tasks(config.tasks)
    # how long a task's questions are is not known before
    window, batch_size = (job.window, config.batch_size) if job.data is not None else (1, 1)
    placed = place(bound, config.dtype, window, batch_size, devices)
    progress("fetching" if "://" in bound.url else "loading", 0.0)
    with local_folder(checkpoint, bound.url) as (folder, digests):
        tokenizer = load_tokenizer(checkpoint, folder) if tasks or isinstance(job.data, TextData) else None
        progress("loading", 0.0)
        model = load_model(folder, config.dtype, name=f"checkpoint {checkpoint}", device=devices[0], placed=placed)
        record: dict[str, Any] = {
            "checkpoint": checkpoint,
            "digests": digests,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": model.config.get_text_config().num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": _called(devices),
        }
        share = 1.0
        if job.data is not None:
            share = 0.5 if tasks else 1.0
            figures, scores = _perplexity(
                job, checkpoint, model, tokenizer, lambda done: progress("perplexity", share * done)
            )
            record |= figures
        if tasks:
            assert tokenizer is not None
            done = 0.5 if job.data is not None else 0.0
            record["tasks"] = run_tasks(
                checkpoint, model, tokenizer, tasks, config, lambda n: progress(f"tasks, {n:,} answers", done)
            )
    return record, scores


def _called(devices: tuple[str, ...]) -> str:
    if devices[0] == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(devices[0])
    return name if len(devices) == 1 else f"{len(devices)} × {name}"


def _perplexity(
    job: Job,
    checkpoint: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Callable[[float], None],
) -> tuple[dict[str, Any], Scores]:
    data, config = job.data, job.config
    assert data is not None
    if isinstance(data, TextData):
        assert tokenizer is not None
        rows = text_rows(data, tokenizer, config.limit)
    else:
        rows = block_rows(data, config.limit)
    begin, total = time.monotonic(), max(data.total, 1)
    batch_size = config.batch_size or fitting_batch(model, job.window)
    scores = score(
        model,
        rows,
        job.window,
        job.stride,
        batch_size,
        name=f"checkpoint {checkpoint}",
        progress=lambda windows, done: progress(min(done / total, 1.0)),
    )
    if not scores.count:
        raise UserError(f"--data {data.name}: there is nothing to score in it")
    seconds = time.monotonic() - begin
    loss, error = ratio(scores.nats, scores.tokens)
    record = {
        "tokens": scores.count,
        "window": job.window,
        "stride": job.stride,
        "windows": len(scores.nats),
        "batch_size": batch_size,
        "loss": loss,
        "loss_stderr": error,
        "perplexity": exp(loss) if math.isfinite(exp(loss)) else None,
        "bits_per_byte": None,
        "tokens_per_second": scores.count / seconds,
        "tokens_sha256": scores.digest,
    }
    if isinstance(data, TextData):
        nbytes = int(scores.nbytes.sum())
        record |= {
            "bits_per_byte": loss * scores.count / (nbytes * math.log(2)),
            "documents": len(scores.nbytes),
            "text_bytes": nbytes,
        }
    return record, scores
