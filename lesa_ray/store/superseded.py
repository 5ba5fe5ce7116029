"""Finished stages that nothing on a store needs any more: of settings or data that have changed since, or made by an
earlier version.

A store keeps what each fleet and comparison consisted of when it was last started. What one of them names is needed,
and so is what the settings of a needed stage name by its place. A stage whose inputs could not be read then has no
identity, so everything of its label stays.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime

from lesa_ray.errors import UserError
from lesa_ray.store.catalog import Store
from lesa_ray.store.garbage import Garbage, NotRemoved, age, clear
from lesa_ray.store.identity import Identity
from lesa_ray.store.record import RECORD_FILE, Record


def find_superseded(store: Store, days: float = 7.0) -> list[Garbage]:
    """Finished stages that are not needed, and were finished so many days ago.

    Raises: UserError if it is not known what is needed; MachineError."""
    finished = store.finished()
    needed = _needed(store, finished)
    return [
        Garbage("finished", place, record["bytes"], f"made {record['started'][:16].replace('T', ' ')}")
        for place, record in finished
        if place not in needed and age(_ended(record)) >= days
    ]


def remove_superseded(
    store: Store, garbage: Sequence[Garbage], holder: str, problem: Callable[[str], None]
) -> list[Garbage]:
    """Remove such stages; those that still were some and could be. Raises: as `find_superseded`.

    problem: is told of each that could not.

    What is needed is looked at again before each, when nobody can begin it any more, and once more when nobody finds it
    finished any more; the records are read again only where a plan has changed."""
    removed: list[Garbage] = []
    plans, needed = None, set[str]()
    for one in garbage:
        record = store.record(one.name)
        if record is None:
            continue
        identity = Identity.from_content(record["identity"])
        lease = store.lease(identity, holder)
        if lease is None:
            continue
        try:
            if plans != (now := store.plans()) or not now:
                plans, needed = now, _needed(store, store.finished())
            if one.name in needed or store.record(one.name) != record:
                continue
            # Noted as unfinished first, so that what an interruption leaves is abandoned, not half a finished stage.
            store.begin(one.name, identity, holder, "was superseded, its removal was interrupted")
            folder = store.folder(one.name)
            with contextlib.suppress(PermissionError):  # as everything else in it: `clear` says so
                folder.remove(RECORD_FILE)
            # Who has found it finished had left a plan before; who comes later does not find it finished.
            stays = True
            try:
                stays = store.plans() != plans and one.name in _needed(store, [*store.finished(), (one.name, record)])
            finally:
                if stays:
                    store.finish(one.name, record)
            if stays:
                continue
            clear(folder)
            store.forget(one.name)
        except NotRemoved as error:
            problem(str(error))
            continue
        finally:
            lease.release()  # its file stays: who has begun the same stage anew by now has it
        removed.append(one)
    return removed


def _needed(store: Store, finished: list[tuple[str, Record]]) -> set[str]:
    """Places of finished stages."""
    plans = store.plans()
    if not plans:
        raise UserError(f"STORE {store.url}: no fleet or comparison was started on it, so what is needed is not known")
    digests, labels = set(), set()
    for name, plan in plans.items():
        try:
            for stage in (plan or {})["stages"]:
                if stage["identity"] is None:
                    labels.add((stage["kind"], stage["label"]))
                else:
                    digests.add(Identity.from_content(stage["identity"]).digest)
        except (LookupError, TypeError) as error:
            raise UserError(
                f"STORE {store.url}: {name} is damaged, so what is needed is not known; start that fleet or comparison "
                "again, or remove the file"
            ) from error
    kinds = {place: place.partition("/")[0] for place, _ in finished}
    needed = {p for p, record in finished if record["digest"] in digests or (kinds[p], record["label"]) in labels}
    found = set(needed)
    while found:
        made_from = [json.dumps(record["given"]) for place, record in finished if place in found]
        found = {place for place in kinds if place not in needed and any(place in given for given in made_from)}
        needed |= found
    return needed


def _ended(record: Record) -> float:
    """In seconds of the clock of the machine that made it."""
    return datetime.fromisoformat(record["started"]).timestamp() + record["seconds"]
