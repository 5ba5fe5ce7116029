"""What a person sees of a fleet and of an artifact store; the same as JSON values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from lesa_ray.fleet.state import Outcome, Standing
from lesa_ray.report.terminal import duration
from lesa_ray.sizes import size
from lesa_ray.store.garbage import Garbage
from lesa_ray.store.record import Record


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """What became of each stage, a line each."""
    table = _table("stage", "", "time", "size", "why")
    for one in outcomes:
        seconds = duration(one.seconds) if one.how == "made" else "–"
        table.add_row(
            one.id, one.how, seconds, size(one.nbytes) if one.nbytes else "–", one.why if one.why != one.how else ""
        )
    return table


def standing_table(standings: Sequence[Standing]) -> Table:
    """Where each stage stands."""
    table = _table("stage", "state", "time", "size", "result", "why")
    for one in standings:
        record = one.record
        table.add_row(
            one.id,
            one.state,
            duration(record["seconds"]) if record else "–",
            size(record["bytes"]) if record else "–",
            headline(record) if record else "",
            one.why if one.state != "complete" else "",
        )
    return table


def record_table(records: Sequence[tuple[str, Record]]) -> Table:
    """The finished stages of a store."""
    table = _table("stage", "started (UTC)", "time", "size", "result")
    for place, record in records:
        started = record["started"][:16].replace("T", " ")
        table.add_row(place, started, duration(record["seconds"]), size(record["bytes"]), headline(record))
    return table


def garbage_table(garbage: Sequence[Garbage]) -> Table:
    """What was abandoned."""
    table = _table("", "name", "size", "detail")
    for one in garbage:
        table.add_row(one.kind, one.name, size(one.nbytes), one.detail)
    return table


def headline(record: Record) -> str:
    """What came of a stage, in a few words."""
    metrics = record["metrics"]
    if "checkpoints" in metrics:
        last = metrics["checkpoints"][-1]
        value = last.get("perplexity")
        return f"perplexity {value:.3f}" if isinstance(value, float) else ""
    if metrics.get("heldout_after") is not None and metrics.get("heldout_before") is not None:
        without = " (without the new layers)" if metrics.get("inserted_over") else ""
        return f"held-out loss {metrics['heldout_before']:.4f}{without} → {metrics['heldout_after']:.4f}"
    if metrics.get("loss") is not None:
        return f"loss {metrics['loss']:.4f}"
    if "layers" in metrics:
        return f"{metrics['layers']} layers"
    return f"{metrics['train_tokens']:,} tokens" if "train_tokens" in metrics else ""


def describe_standing(standing: Standing) -> dict[str, Any]:
    """As JSON values."""
    record = standing.record
    return {
        "stage": standing.id,
        "state": standing.state,
        "why": standing.why,
        "place": standing.place,
        **({"seconds": record["seconds"], "bytes": record["bytes"], "metrics": record["metrics"]} if record else {}),
    }


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in columns:
        right = column in ("time", "size")
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table
