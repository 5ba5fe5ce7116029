"""Mutual exclusion with plain files, for stores that have no compare-and-swap (rclone's S3 server, older others).

Each who wants a thing writes a claim, a file of its own, and only then looks at the others' claims. Of two, the one who
looked later has seen the other, so both cannot find themselves alone:

    write my claim ▸ list ▸ alone: mine · someone holds it: withdraw · others want it too: the smallest name stays, the
    rest withdraw, and it looks again until it is alone

This is safe on a store whose listings show what was written before (S3 since December 2020, rclone, a filesystem), as
long as a write takes less than three tenths of the term; it needs several requests where compare-and-swap needs two. A
store that also serves stale listings has no safe way but conditional writes.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError
from lesa_ray.faults import is_outage
from lesa_ray.store.process import holder_is_alive
from lesa_ray.store.register import Unchanged, stamp

_LOOKS = 50
_PAUSE_SECONDS = 0.2


class StoreClock:
    """The time of a store that does not tell it: when a file was written there just now, and what has passed since."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._ahead: float | None = None

    def age(self, modified: datetime) -> float:
        """Seconds since then; 0 if the store's time cannot be found out, as by who may not write."""
        if self._ahead is None:
            name = f".clock-{uuid.uuid4().hex}"
            try:
                self._storage.write(name, b"0")
                written: datetime = self._storage.fs.modified(self._storage.path(name))
                self._storage.remove(name)
            except Exception as error:  # each backend has its own class for "no access"
                if isinstance(error, MachineError) or is_outage(error):
                    raise
                return 0.0
            self._ahead = written.timestamp() - time.monotonic()
        return max(0.0, self._ahead + time.monotonic() - modified.timestamp())


class Claims:
    """The claims on one thing: a folder of small files."""

    def __init__(self, storage: Storage, slack: float, unchanged: Unchanged, clock: StoreClock) -> None:
        """slack: seconds that the storage's times may be coarse by. unchanged: what this observer has seen so far."""
        self._storage, self._slack, self._unchanged, self._clock = storage, slack, unchanged, clock
        self.id = uuid.uuid4().hex
        self._own: set[str] = set()

    def take(self, told: Mapping[str, Any], term: float) -> bool:
        """Whether the thing is this object's from now on. told: what others may know of its holder."""
        if self.held() is not None:
            return False
        self.write(told, term, held=False)
        for _ in range(_LOOKS):
            others = self._others()
            if not others:
                self.write(told, term, held=True)
                return True
            if any(claim["held"] for claim in others.values()) or min(others) < self.id:
                break
            time.sleep(_PAUSE_SECONDS)
        self.withdraw()
        return False

    def take_again(self, told: Mapping[str, Any], term: float) -> bool:
        """Whether the thing is this object's again, of whose claim others may think that it ran out.

        The claim is a new one, as others may be about to remove the old, which stays until this is decided: to whom the
        process is known to live, it still counts."""
        former, self.id = set(self._own), uuid.uuid4().hex
        if not self.take(told, term):
            self.withdraw()
            return False
        self._remove(former)
        return True

    def write(self, told: Mapping[str, Any], term: float, *, held: bool) -> None:
        """Make or renew this object's claim."""
        self._own.add(self.id)
        content = {**told, "term": term, "held": held, "nonce": uuid.uuid4().hex}
        self._storage.write(f"{self.id}.json", (json.dumps(content) + "\n").encode())

    def stands(self) -> bool:
        """Whether this object's claim is there; others remove one that was not renewed."""
        return self._storage.exists(f"{self.id}.json")

    def withdraw(self) -> None:
        self._remove(set(self._own))

    def _remove(self, claims: set[str]) -> None:
        for claim in claims:
            self._storage.remove(f"{claim}.json")
            self._own.discard(claim)

    def held(self) -> dict[str, Any] | None:
        """The claim of who holds the thing now, if anyone does."""
        return next((claim for claim in self._others().values() if claim["held"]), None)

    def _others(self) -> dict[str, dict[str, Any]]:
        """Claims of others that still count, by name; those of the dead are removed."""
        found = {}
        for file in self._storage.list():
            name = file.removesuffix(".json")
            if name in self._own or name.startswith(".") or name == file:
                continue
            try:
                age, claim = self._age(file), json.loads(self._storage.read(file))
            except FileNotFoundError:
                continue  # withdrawn meanwhile
            age = max(age, self._unchanged.seconds(self._storage.path(file), claim["nonce"]))
            alive = holder_is_alive(claim)
            if alive or (alive is None and age <= claim["term"] + self._slack):
                found[name] = claim
            else:
                self._storage.remove(file)
        return found

    def _age(self, file: str) -> float:
        """Seconds since a claim was renewed. Raises: FileNotFoundError."""
        if self._storage.is_s3:
            found = stamp(self._storage, file)
            if found is None:
                raise FileNotFoundError(file)
            return found[1]
        return self._clock.age(self._storage.fs.modified(self._storage.path(file)))
