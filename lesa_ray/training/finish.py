"""The end of a run: its summary, the exported checkpoint, and what the caller is told."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError
from lesa_ray.expansion.runner import Listener
from lesa_ray.training.chat import ChatEncoder
from lesa_ray.training.checkpoints import FOLDER, Record, find_complete, folder_name
from lesa_ray.training.export import ExportPlan, OutFile, export, plan_export
from lesa_ray.training.metrics import metrics_rows
from lesa_ray.training.run import RESULT_FILE, Run, read_json
from lesa_ray.training.tokenizer import load_tokenizer
from lesa_ray.training.tokens import TOKENIZER_DIR

ExportWork = Callable[[ExportPlan, Sequence[OutFile]], None]


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
    inserted_over: int | None
    """Steps over which new layers came in; then `heldout_before` is without them."""
    reused: bool
    resumed: bool


def is_trained(run: Run) -> bool:
    """Whether the run's last checkpoint is there, so that only the export is missing."""
    records = find_complete(run.config.out, run.identity)
    return bool(records) and records[-1].step == run.steps


def finish_run(run: Run, listener: Listener, work: ExportWork | None = None) -> None:
    """Write the summary and the checkpoint; from then on the run is done.

    work: writes files of weights, on whatever machines (see `lesa_ray.training.export.export`)."""
    storage = Storage(run.config.out)
    records = find_complete(run.config.out, run.identity)
    if not records or records[-1].step != run.steps:
        raise MachineError(f"OUT {run.config.out}: its last checkpoint is gone; the same command makes it again")
    content = summarise(run)
    storage.write(RESULT_FILE, (json.dumps(content, indent=1) + "\n").encode())
    listener.phase("writing the checkpoint", 0)
    export(export_plan(run, records[-1], run.config.out), facts(run, content), work)


def export_plan(run: Run, record: Record, out: str) -> ExportPlan:
    """How a training checkpoint of the run becomes a Hugging Face folder at `out`."""
    state = Storage(run.config.out).within(f"{FOLDER}/{folder_name(record.step)}").url
    tokenizer = Storage(run.blocks.url).within(TOKENIZER_DIR)
    has_tokenizer, chat = bool(tokenizer.list()), run.blocks.kind == "chat"
    stop = ChatEncoder(load_tokenizer(tokenizer.url), tokenizer.url).stop() if chat and has_tokenizer else None
    return plan_export(
        run.checkpoint,
        state,
        out,
        config=run.architecture,
        tokenizer=tokenizer.url if has_tokenizer and (run.checkpoint is None or chat) else None,
        dtype=run.config.dtype or "bfloat16",
        stop=stop,
    )


def facts(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    """What the model card says of the training."""
    config = run.config
    return {
        "data": run.blocks.url.rstrip("/").rsplit("/", 1)[-1],
        "trained": ", ".join(config.train) or ("all" if run.checkpoint is None else "what expansion.json says"),
        "trained_parameters": run.trained_parameters,
        "parameters": run.parameters,
        "steps": content["steps"],
        "tokens": content["tokens"],
        "batch": config.batch,
        "seq_len": run.blocks.seq_len,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "precision": "bfloat16" if run.bf16 else "float32",
        "inserted": None if run.insertion is None else f"{run.insertion}; the loss before is without them",
        "heldout_loss_before": content["heldout_before"],
        "heldout_loss": content["heldout_after"],
    }


def summarise(run: Run) -> dict[str, Any]:
    """The run in numbers, from its metrics."""
    losses, speeds = array("d"), array("d")
    heldout: dict[int, float] = {}
    for row in metrics_rows(run.config.out):
        if row.get("loss") is not None:
            losses.append(row["loss"])
        if row.get("heldout_loss") is not None:
            heldout[row["step"]] = row["heldout_loss"]
        if row.get("tokens_per_second"):
            speeds.append(row["tokens_per_second"])
    tenth = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": run.steps,
        "tokens": run.tokens,
        "parameters": run.parameters,
        "trained_parameters": run.trained_parameters,
        "loss": sum(tenth) / len(tenth),
        "heldout_before": heldout.get(0),
        "heldout_after": heldout.get(run.steps),
        "tokens_per_second": sorted(speeds)[len(speeds) // 2],
    }


def trained_result(run: Run, *, reused: bool = False, resumed: bool = False) -> Trained:
    """What a finished run gave."""
    content = read_json(Storage(run.config.out), RESULT_FILE)
    assert content is not None
    inserted = None if run.insertion is None else run.insertion.steps
    return Trained(out=run.config.out, **content, inserted_over=inserted, reused=reused, resumed=resumed)
