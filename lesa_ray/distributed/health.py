"""What Ray's dashboard and whatever scrapes its nodes (Prometheus) see of a stage while it runs.

    ray_lesa_ray_tasks_total            units, shards, pieces, checkpoints measured: finished since the stage began
    ray_lesa_ray_bytes_total            bytes written (expand) or read (tokenize)
    ray_lesa_ray_step, _loss, _heldout_loss, _tokens_per_second    of training, as last heard

Each carries `run` (the address of its output, quoted as in a URL, as Ray takes ASCII alone) and `stage` (expand,
tokenize, train, evaluate). Told by the process that leads the stage, a few times a second at most, through Ray's own
metrics, which every node serves beside its other figures (`ray start --metrics-export-port`).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge, Metric

if TYPE_CHECKING:
    from lesa_ray.training.loop import Progress

_TAGS = ("run", "stage")


@cache
def _metrics() -> dict[str, Metric]:
    """Once in a process: Ray takes a name a single time."""
    counters = {"tasks": "Tasks of a stage that have ended well", "bytes": "Bytes a stage has written or read"}
    gauges = {
        "step": "Optimizer steps done",
        "loss": "Training loss, nats a token",
        "heldout_loss": "Held-out loss, nats a token",
        "tokens_per_second": "Training tokens a second, all workers",
    }
    made: dict[str, Metric] = {name: Counter(f"lesa_ray_{name}", text, _TAGS) for name, text in counters.items()}
    return made | {name: Gauge(f"lesa_ray_{name}", text, _TAGS) for name, text in gauges.items()}


class Health:
    """The figures of one stage."""

    def __init__(self, run: str, stage: str) -> None:
        """run: where its output goes."""
        self._tags = {"run": quote(run, safe=":/"), "stage": stage}

    def task_ended(self, nbytes: int = 0) -> None:
        """A task ended well, and wrote or read `nbytes`."""
        self._count("tasks", 1)
        if nbytes:
            self._count("bytes", nbytes)

    def trained(self, progress: Progress) -> None:
        """Training is at `progress`."""
        values = {
            "step": progress.step,
            "loss": progress.loss,
            "heldout_loss": progress.heldout_loss,
            "tokens_per_second": progress.tokens_per_second,
        }
        for name, value in values.items():
            gauge = _metrics()[name]
            assert isinstance(gauge, Gauge)
            if value is not None:
                gauge.set(value, self._tags)

    def _count(self, name: str, amount: int) -> None:
        counter = _metrics()[name]
        assert isinstance(counter, Counter)
        counter.inc(amount, self._tags)
