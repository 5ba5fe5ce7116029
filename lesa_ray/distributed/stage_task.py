"""One stage of a fleet as a Ray task: the command's own function, then the size and SHA-256 of every file it left.

The task takes no CPU of the cluster's: it leads, its own tasks and workers do the work, and Ray may place it on any
machine. When its worker or machine is lost Ray starts it again elsewhere, and the command goes on where OUT says.
Processes serve one stage after another, so that a small stage does not pay for importing torch again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.config import ExpandConfig, Settings
from lesa_ray.distributed.shared import Landmark, check_landmarks
from lesa_ray.distributed.tenancy import Guarded
from lesa_ray.evaluation.settings import EvaluateConfig
from lesa_ray.expansion.runner import Listener
from lesa_ray.store.catalog import utc_now
from lesa_ray.store.record import FileRecord, describe_files
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig

_TELL_SECONDS = 1.0


class Done(TypedDict):
    """What a stage gave, for its record."""

    started: str
    seconds: float
    metrics: dict[str, Any]
    files: dict[str, FileRecord]


class Teller:
    """A listener that leaves a line on a board now and then."""

    def __init__(self, board: Any, key: str) -> None:
        self._board, self._key = board, key
        self._name, self._total, self._told = "", 0.0, 0.0

    def phase(self, name: str, total: float) -> None:
        self._name, self._total, self._told = name, total, time.monotonic()
        self._board.put.remote(self._key, name, 0.0)

    def progress(self, done: float, detail: str) -> None:
        if time.monotonic() - self._told > _TELL_SECONDS and self._total:
            self._told = time.monotonic()
            self._board.put.remote(self._key, f"{self._name}: {detail}", done / self._total)


def run_stage(settings: Settings, out: str, key: str, board: Any, folders: tuple[Landmark, ...]) -> Done:
    """Run a stage's command, or find that it is done, and describe what lies at OUT. Whoever starts this task has the
    stage's lease, so nobody else works there.

    folders: what has to be found here, so that the fleet finds what is left at OUT.
    Raises: UserError, MachineError as the command does; UnsharedError."""
    check_landmarks(folders)
    os.environ["RAY_ADDRESS"] = "auto"  # the stage is part of a cluster, even where its fleet started that by itself
    started, begin = utc_now(), time.monotonic()
    listener = Teller(board, key)
    metrics = _run(settings, listener)
    listener.phase("reading back what was written", 0)
    files = describe_files(Storage(out))
    return Done(started=started, seconds=time.monotonic() - begin, metrics=metrics, files=files)


def _run(settings: Settings, listener: Listener) -> dict[str, Any]:
    """The command; its result in numbers."""
    if isinstance(settings, ExpandConfig):
        from lesa_ray.distributed.expand import expand

        grown = expand(settings, listener=listener, tenant=Guarded())
        return {"layers": grown.layers, "parameters": grown.parameters}
    if isinstance(settings, TokenizeConfig):
        from lesa_ray.distributed.tokenize import tokenize

        blocks = tokenize(settings, listener, tenant=Guarded()).blocks
        return {"train_tokens": blocks.train.tokens, "heldout_rows": blocks.heldout.rows, "digest": blocks.digest}
    if isinstance(settings, FinetuneConfig):
        from lesa_ray.distributed.finetune import finetune

        return _numbers(asdict(finetune(settings, listener, tenant=Guarded())))
    if isinstance(settings, TrainConfig):
        from lesa_ray.distributed.train import pretrain

        return _numbers(asdict(pretrain(settings, listener, tenant=Guarded())))
    assert isinstance(settings, EvaluateConfig)
    from lesa_ray.distributed.evaluate import evaluate

    report = evaluate(settings, listener, use_ray=True)
    return {"checkpoints": report["checkpoints"]}


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("out", "reused", "resumed")}
