"""The end of a run: its summary, the exported checkpoint, and what the caller is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.runner import Listener
from lesa_ray.training.metrics import read_metrics
from lesa_ray.training.run import RESULT_FILE, Run, read_json


@dataclass(frozen=True)
class Trained:
    """A finished run. Losses in nats a token; None where the held-out loss was not measured."""

    out: str
    steps: int
    tokens: int
    parameters: int
    trained_parameters: int
    loss: float
    """Mean over the last tenth of the steps."""
    heldout_before: float | None
    heldout_after: float | None
    tokens_per_second: float
    """Median over the run."""
    reused: bool
    resumed: bool


def finish_run(run: Run, listener: Listener) -> None:
    """Write the summary and the checkpoint; from then on the run is done."""
    storage = Storage(run.config.out)
    content = summarise(run)
    storage.write(RESULT_FILE, (json.dumps(content, indent=1) + "\n").encode())


def summarise(run: Run) -> dict[str, Any]:
    """The run in numbers, from its metrics."""
    rows = read_metrics(run.config.out)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    heldout = {row["step"]: row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None}
    speeds = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second"))
    tenth = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": run.steps,
        "tokens": run.tokens,
        "parameters": run.parameters,
        "trained_parameters": run.trained_parameters,
        "loss": sum(tenth) / len(tenth),
        "heldout_before": heldout.get(0),
        "heldout_after": heldout.get(run.steps),
        "tokens_per_second": speeds[len(speeds) // 2],
    }


def trained_result(run: Run, *, reused: bool = False, resumed: bool = False) -> Trained:
    """What a finished run gave."""
    content = read_json(Storage(run.config.out), RESULT_FILE)
    assert content is not None
    return Trained(out=run.config.out, **content, reused=reused, resumed=resumed)
