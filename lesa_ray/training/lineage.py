"""What a checkpoint was trained on before, as far as its own records tell.

The order of rows follows from the seed and the step alone. A run on the token blocks on which its checkpoint, or the
base that was grown, has been trained with the same seed begins with the very rows that one began with: they say less
than rows that are new, and beside runs with other seeds they make the seeds unlike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lesa_ray.checkpoint.manifest import read_manifest
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.places import is_of_a_store
from lesa_ray.training.run import RUN_FILE, Run, read_json

_GENERATIONS = 16
"""So many are looked back at: a folder may have been written where its own base lay."""


def replayed(run: Run) -> str | None:
    """A line that says which earlier run this one repeats, or None if none is known."""
    if run.checkpoint is None:
        return None
    for name, record in _before(str(run.config.checkpoint)):
        config, summary = record.get("config", {}), record.get("summary", {})
        same = (record.get("data"), config.get("seed")) == (run.blocks.digest, run.config.seed)
        if same and {"steps", "batch"} <= summary.keys():
            rows = summary["steps"] * summary["batch"]
            return (
                f"checkpoint {run.config.checkpoint}: {name} was trained on the same token blocks with the same seed, "
                f"so this run begins with the {rows:,} rows that one saw, in the same order; another --seed gives "
                "another order"
            )
    return None


def _before(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The training runs behind a checkpoint, the last one first: their places and records."""
    for _ in range(_GENERATIONS):
        try:
            storage = Storage(name)
            record = read_json(storage, RUN_FILE)
            manifest = read_manifest(storage) if record is None else None
        except Exception:  # a repo id of the hub, a place that is gone or refused: a warning is not worth a run
            return
        if record is not None:
            yield name, record
        earlier = (
            record.get("config", {}).get("checkpoint") if record is not None else manifest and manifest.get("base")
        )
        if not isinstance(earlier, str) or not earlier or not is_of_a_store(earlier):
            return
        name = earlier
