"""Held-out loss against tokens, seconds and FLOPs, from a run's metrics; and where a curve first reaches a loss.

Decides
- Seconds are those of training alone: what the rows say of the pace, so neither measuring nor starting nor an
  interruption is in them. They depend on the machine, and on what ran beside the run; tokens and FLOPs do not.
- FLOPs are what the model needs (`lesa_ray.training.flops`), of the tokens trained on so far.
- Between two measurements a curve is a straight line, so a loss is reached between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from lesa_ray.comparison.statistics import cost_to_reach
from lesa_ray.training.metrics import metrics_rows

Axis = Literal["tokens", "seconds", "flops"]
AXES: tuple[Axis, ...] = ("tokens", "seconds", "flops")


class Point(TypedDict):
    """A measurement of the held-out loss, in nats a token."""

    step: int
    tokens: int
    seconds: float
    flops: float
    loss: float


def curve_of(out: str) -> list[Point]:
    """The measurements of the run at `out`, as far as it came."""
    return curve(metrics_rows(out, ("heldout_loss", "tokens_per_second")))


def curve(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The measurements of a run. rows: of its metrics (`lesa_ray.training.metrics.metrics_rows`).

    A row that says how many tokens went by a second ends a window of steps at that pace."""
    points: list[Point] = []
    tokens = window = 0
    seconds = flops = 0.0
    for row in rows:
        if row.get("tokens") is not None:
            tokens = int(row["tokens"])
        if pace := row.get("tokens_per_second"):
            seconds += (tokens - window) / pace
            flops += (tokens - window) * row.get("model_flops_per_second", 0.0) / pace
            window = tokens
        if row.get("heldout_loss") is not None:
            points.append(
                Point(step=row["step"], tokens=tokens, seconds=seconds, flops=flops, loss=row["heldout_loss"])
            )
    return points


def whole(arm: Mapping[str, Any], run: Mapping[str, Any]) -> list[Point]:
    """A run's curve from where all its new layers are in: until then it is that of a model with gates, which nobody
    gets. arm, run: of a comparison's content."""
    since = arm.get("inserted_tokens") or 0
    return [point for point in run["curve"] if point["tokens"] >= since]


def reached(arm: Mapping[str, Any], run: Mapping[str, Any], level: float, axis: Axis) -> float | None:
    """What a run had spent when its whole model first was at `level` or below it; None if it never was."""
    points = whole(arm, run)
    return cost_to_reach([point[axis] for point in points], [point["loss"] for point in points], level)
