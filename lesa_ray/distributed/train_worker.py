"""What Ray runs elsewhere during training: the workers' entry, and the board they write on.

Imports nothing heavy, since Ray Train's controller and the board import this module too: torch and transformers would
cost each of them seconds and half a gigabyte. For the same reason a run travels as bytes, progress as plain values.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from lesa_ray.training.loop import Progress

_AGREE_SECONDS = 5.0
_FULL = (
    "a worker needs more memory than its GPU has; --activation-checkpointing, a smaller --micro-batch, --cpu-offload "
    "and more workers each take less, and a run goes on with them where it was"
)


class Board:
    """Keeps how far the run is, and what stopped it, for the driver and for workers that are started again."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] | None = None
        self._failure: str | None = None
        self._failed = 0

    def put(self, progress: dict[str, Any]) -> None:
        self._progress = progress

    def get(self) -> dict[str, Any] | None:
        return self._progress

    def fail(self, message: str) -> None:
        self._failure = self._failure or message
        self._failed += 1

    def failed(self) -> int:
        """How many workers have found the input wrong."""
        return self._failed

    def failure(self) -> str | None:
        return self._failure


def work(loop_config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from lesa_ray.distributed.shared import check_landmarks
    from lesa_ray.errors import UserError
    from lesa_ray.gpu import is_full, limit_device
    from lesa_ray.training.worker import train

    board = loop_config["board"]
    if ray.get(board.failure.remote()) is not None:
        return
    device = get_device()
    torch.set_num_threads(loop_config["threads"])  # beside a GPU too: offloaded parameters are stepped on the CPU
    if device.type != "cpu":
        limit_device(loop_config["gpus"])

    def tell(progress: Progress) -> None:
        board.put.remote(asdict(progress))

    try:
        check_landmarks(pickle.loads(loop_config["folders"]))
        train(pickle.loads(loop_config["run"]), device, tell)
    except (UserError, RuntimeError) as error:
        if not (isinstance(error, UserError) or is_full(error)):
            raise
        ray.get(board.fail.remote(str(error) if isinstance(error, UserError) else _FULL))
        deadline = time.monotonic() + _AGREE_SECONDS
        while time.monotonic() < deadline:
            if ray.get(board.failed.remote()) == get_context().get_world_size():
                return  # all found the same: nobody is left waiting for this worker
            time.sleep(0.1)
        raise
