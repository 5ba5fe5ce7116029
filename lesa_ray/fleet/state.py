"""Where a fleet's stages stand, as far as the store says: finished, under way somewhere, or to be made, and why.

`look` serves a fleet that runs, `--dry-run` and `status` alike. `status` reads the stages that the fleet left in the
store when it was last started, so it needs neither the checkpoints nor the data, nor Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.fleet.settings import GraphConfig
from lesa_ray.fleet.stages import Stage
from lesa_ray.store.catalog import Store, utc_now
from lesa_ray.store.identity import Identity, canonical
from lesa_ray.store.record import Record

State = Literal["complete", "running", "failed", "waiting", "unknown"]
How = Literal["made", "complete", "failed", "skipped"]

THREADS = 8
"""That look at stages, as most of a look is waiting for the store."""


@dataclass(frozen=True)
class Standing:
    """Where one stage stands. why: what there is to say of it in a few words."""

    id: str
    place: str
    state: State
    why: str
    record: Record | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. why: why it was made or not, or what stopped it."""

    id: str
    how: How
    why: str
    place: str = ""
    seconds: float = 0.0
    nbytes: int = 0


def look(store: Store, identity: Identity, label: str) -> Standing:
    """Where a stage stands now; of one that waits not why, as that takes many reads and a fleet looks all the time.

    Raises: MachineError if the store does not answer; UserError if its record is bad."""
    place, record = store.locate(identity, label)
    name = f"{identity.kind}/{label}"
    if record is not None:
        return Standing(name, place, "complete", "complete", record)
    worker = store.worker(identity)
    if worker is not None:
        return Standing(name, place, "running", f"under way, {worker}")
    begun = store.begun(place)
    if begun is not None and begun.failure:
        return Standing(name, place, "failed", begun.failure)
    return Standing(name, place, "waiting", "")


def look_at_all(store: Store, stages: Iterable[Stage]) -> list[Standing]:
    """Where all stages stand; one whose input has no identity is unknown.

    Raises: UserError if the store cannot be read; MachineError if it does not answer."""
    with reaching(f"store {store.url}"):
        return _standings(store, [(stage.kind, stage.label, stage.identity, stage.problem) for stage in stages])


def leave_plan(store: Store, config: GraphConfig, stages: Iterable[Stage]) -> None:
    """Leave the stages in the store, for `status`. Raises: MachineError."""
    content = {
        config.what: config.name,
        "started": utc_now(),
        "file": file_digest(config),
        "stages": [
            {"label": s.label, "kind": s.kind, "identity": s.identity and s.identity.content, "problem": s.problem}
            for s in stages
        ],
    }
    store.write_plan(config.what, config.name, content)


def status(store: Store, config: GraphConfig) -> tuple[list[Standing], dict[str, Any]]:
    """Where the stages of a fleet stand as it was last started; and when that was, and whether the file has changed.

    Raises: UserError if it never was; MachineError."""
    content = store.read_plan(config.what, config.name)
    if content is None:
        raise UserError(f"{config.what} {config.name}: was never started on {store.url}; give the command FILE alone")
    stages = content["stages"]
    identities = [stage["identity"] and Identity.from_content(stage["identity"]) for stage in stages]
    standings = _standings(
        store, [(s["kind"], s["label"], identity, s["problem"]) for s, identity in zip(stages, identities, strict=True)]
    )
    facts = {"started": content["started"], "file_changed": content["file"] != file_digest(config)}
    return standings, facts


def _standings(store: Store, stages: Sequence[tuple[str, str, Identity | None, str | None]]) -> list[Standing]:
    """Where stages stand, and why those that wait have to be made. stages: kind, label, identity, problem of each."""

    def standing(stage: tuple[str, str, Identity | None, str | None]) -> Standing:
        kind, label, identity, problem = stage
        if identity is None:
            return Standing(f"{kind}/{label}", "", "unknown", problem or "")
        found = look(store, identity, label)
        return replace(found, why=store.why(identity, label)) if found.state == "waiting" else found

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(standing, stages))


def file_digest(config: GraphConfig) -> str:
    """SHA-256 of a graph's settings."""
    return hashlib.sha256(canonical(config.model_dump(mode="json"))).hexdigest()
