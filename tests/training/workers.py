"""Real worker processes with a gloo process group, without Ray: what they return comes back by rank.

They are forked from a server that imports what is heavy once for all tests, and get this process's environment."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lesa_ray.training.run import claim, prepare
from lesa_ray.training.train_settings import TrainConfig
from lesa_ray.training.worker import train

HEAVY = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers.modeling_utils", "s3fs",
         "lesa_ray.training.worker", "lesa_ray.training.finish"]  # fmt: skip


def run_workers(function: Callable[..., Any], workers: int, *arguments: Any, timeout: float = 720) -> list[Any]:
    """`function(*arguments)` in each of `workers` processes; their results by rank."""
    with tempfile.TemporaryDirectory() as scratch:
        multiprocessing.set_forkserver_preload(HEAVY)
        given = (function, workers, scratch, dict(os.environ), arguments)
        context = mp.start_processes(_enter, given, workers, join=False, start_method="forkserver")
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: workers still run after {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        results = []
        for rank in range(workers):
            with open(os.path.join(scratch, f"result-{rank}"), "rb") as file:
                results.append(pickle.load(file))
        return results


def _enter(
    rank: int, function: Callable[..., Any], workers: int, scratch: str, environment: dict[str, str],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(scratch, "store"), workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    result = function(*arguments)
    with open(os.path.join(scratch, f"result-{rank}"), "wb") as file:
        pickle.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


def run_all(settings: dict[str, Any]) -> None:
    """A worker's whole training with these settings, on the CPU; OUT is not exported."""
    run = prepare(TrainConfig.model_validate(settings), gpus=False)
    claim(run)
    train(run, torch.device("cpu"), lambda progress: None)
