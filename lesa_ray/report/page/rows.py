"""Rows of a training run as the page draws them: a run of a million steps has more than can be seen, or kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_MOST = 8192
"""Steps that are kept; beyond that neighbours become one, until half as many are left."""
_NAMES = ("step", "tokens", "loss", "heldout_loss", "inserted")


def thinned(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn of `rows`, in order. Of more steps than `_MOST` each row has the mean loss of several, and all else
    of the last of them. Held-out losses stay as they are, losses that are no number, and the row where the last new
    layer is in."""
    steps: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    size = filled = 1
    whole = False
    for row in rows:
        last = {name: row[name] for name in _NAMES if name in row}
        if "heldout_loss" in row or not isinstance(row.get("loss"), float) or (row.get("inserted") == 1 and not whole):
            whole = whole or row.get("inserted") == 1
            single.append(last)
            continue
        if steps and filled < size:
            filled += 1
            steps[-1] = {**last, "loss": steps[-1]["loss"] + (last["loss"] - steps[-1]["loss"]) / filled}
            continue
        if len(steps) == _MOST:
            steps = [{**b, "loss": (a["loss"] + b["loss"]) / 2} for a, b in zip(steps[::2], steps[1::2], strict=True)]
            size *= 2
        steps.append(last)
        filled = 1
    return sorted([*steps, *single], key=lambda row: row["step"])
