"""The rows that a training run has written."""

from __future__ import annotations

from typing import Any

from lesa_ray.training.metrics import metrics_rows


def read_metrics(out: str) -> list[dict[str, Any]]:
    return list(metrics_rows(out))
