"""An artifact store: a folder of any storage in which each finished stage can be found by what made it.

    STORE/KIND/LABEL-HASH12/            a stage's output
    STORE/KIND/LABEL-HASH12/stage.json  its record, written last: from then on the folder is not written again
    STORE/.lesa-ray/leases/             who is working on what
    STORE/.lesa-ray/begun/KIND/…json    stages that were begun and are not finished, and what stopped them last
    STORE/.lesa-ray/fleets/NAME.json    the stages of each fleet (comparison, …) as it was last started

Two stages that are the same but for their labels are one: the leases know hashes only, and `locate` finds the other's
result. Whether a stage is finished is asked of its record, never of a listing, which some stores serve late.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.store.identity import KINDS, Identity, difference, parse_place
from lesa_ray.store.lease import TERM_SECONDS, Lease, Leases
from lesa_ray.store.process import this_process
from lesa_ray.store.record import RECORD_FILE, Record, read_record, write_record

PLANNED = ("fleet", "comparison")
"""What has stages and leaves a plan of them."""
_THREADS = 16


@dataclass(frozen=True)
class Begun:
    """A stage that was begun and is not finished."""

    place: str
    identity: Identity
    holder: str
    """Who began, or went on with it, last."""
    since: str
    failure: str | None
    """What ended the last attempt, if something did that was seen."""


class Store:
    """An artifact store; nothing is written until a stage is begun."""

    def __init__(self, url: str, term: float = TERM_SECONDS) -> None:
        """term: seconds after which a dead process's lease is free. Raises: UserError if there can be no such store."""
        self.storage = Storage(url)
        self.url = self.storage.url
        self.control = self.storage.within(WORK_DIR)
        self.leases = Leases(self.control, term)

    def folder(self, place: str) -> Storage:
        """Where a stage's output lies. Raises: UserError if `place` is not a stage's."""
        if parse_place(place) is None:
            raise UserError(
                f"{place}: is not a stage's place; expected KIND/LABEL-HASH12, KIND one of {', '.join(KINDS)}"
            )
        return self.storage.within(place)

    def record(self, place: str) -> Record | None:
        """The record of a finished stage; None if it is not finished. One that came from elsewhere is none."""
        record = read_record(self.folder(place))
        return record if record is not None and place.endswith(f"-{record['digest'][:12]}") else None

    def locate(self, identity: Identity, label: str) -> tuple[str, Record | None]:
        """The place of a stage, and its record if it is finished; under another label if that was there first.

        Raises: UserError if the record at its own place cannot be read."""
        place = identity.place(label)
        record = self.record(place)
        if record is not None:
            return place, record
        for other, _, digest in self._places(identity.kind):
            if digest == identity.digest[:12] and other != place:
                record = self._readable(other)
                if record is not None and record["digest"] == identity.digest:
                    return other, record
        return place, None

    def finished(self, kind: str | None = None) -> list[tuple[str, Record]]:
        """Places and records of all finished stages (of a kind), in the order in which they were started.

        A record that cannot be read is passed over here; `verify` says what is wrong with it."""
        places = [place for one in ((kind,) if kind else KINDS) for place, _, _ in self._places(one)]
        return self._in_order(places)

    def _in_order(self, places: Sequence[str]) -> list[tuple[str, Record]]:
        """The records that can be read, with their places, in the order in which the stages were started."""
        with ThreadPoolExecutor(_THREADS) as pool:
            records = zip(places, pool.map(self._readable, places), strict=True)
            found = [(place, record) for place, record in records if record is not None]
        return sorted(found, key=lambda item: item[1]["started"])

    def _readable(self, place: str) -> Record | None:
        """The record of a finished stage, unless it is damaged or of another format."""
        try:
            return self.record(place)
        except UserError:
            return None

    def lease(self, identity: Identity, holder: str) -> Lease | None:
        """The right to work on a stage, or None if someone has it."""
        return self.leases.acquire(lease_name(identity.kind, identity.digest), holder, this_process())

    def worker(self, identity: Identity) -> str | None:
        """Who is working on a stage now."""
        return self.leases.holder(lease_name(identity.kind, identity.digest))

    def begin(self, place: str, identity: Identity, holder: str, failure: str | None = None) -> None:
        """Note that a stage was begun, or what stopped it. To be called with its lease."""
        content = {"identity": identity.content, "holder": holder, "since": utc_now(), "failure": failure}
        self.control.write(begun_file(place), (json.dumps(content, ensure_ascii=False) + "\n").encode())

    def begun(self, place: str) -> Begun | None:
        """What is noted of an unfinished stage."""
        try:
            content = json.loads(self.control.read(begun_file(place)))
            identity = Identity.from_content(content["identity"])
            return Begun(place, identity, content["holder"], content["since"], content.get("failure"))
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def unfinished(self) -> list[Begun]:
        """All stages that were begun and are not finished. One whose record cannot be read was finished."""
        places = [
            f"{kind}/{name.removesuffix('.json')}"
            for kind in KINDS
            for name in self.control.within(f"begun/{kind}").list()
            if name.endswith(".json") and parse_place(f"{kind}/{name.removesuffix('.json')}")
        ]

        def is_finished(place: str) -> bool:
            try:
                return self.record(place) is not None
            except UserError:
                return True

        with ThreadPoolExecutor(_THREADS) as pool:
            found = zip(pool.map(self.begun, places), pool.map(is_finished, places), strict=True)
            return [one for one, finished in found if one is not None and not finished]

    def finish(self, place: str, record: Record) -> None:
        """Make a stage a finished one. To be called with its lease."""
        write_record(self.folder(place), record)
        self.control.remove(begun_file(place))

    def settle(self, lease: Lease) -> None:
        """Let go of the lease of a stage that is finished. Its file goes: who takes it from now on finds the record."""
        lease.release()
        self.leases.forget(lease.name)

    def forget(self, place: str) -> None:
        """Remove what is noted of an unfinished stage."""
        self.control.remove(begun_file(place))

    def why(self, identity: Identity, label: str) -> str:
        """Why a stage that is not finished has to be made. This reads all records that have its label."""
        if self.begun(identity.place(label)) is not None:
            return "was interrupted, goes on"
        earlier = self._in_order([place for place, other, _ in self._places(identity.kind) if other == label])
        if not earlier:
            return "new"
        _, latest = earlier[-1]
        return difference(Identity.from_content(latest["identity"]), identity)

    def _places(self, kind: str) -> Iterator[tuple[str, str, str]]:
        """Place, label and first digits of the hash of each stage's folder of a kind."""
        for name in self.storage.within(kind).folders():
            parsed = parse_place(f"{kind}/{name}")
            if parsed is not None:
                yield f"{kind}/{name}", parsed[1], parsed[2]

    def write_plan(self, what: str, name: str, content: dict[str, Any]) -> None:
        """Leave the stages of a fleet or the like (`what`) where its status is looked for."""
        self.control.write(f"{what}s/{name}.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    def read_plan(self, what: str, name: str) -> dict[str, Any] | None:
        """What `write_plan` left; None if no such thing was started on this store."""
        return self._read_plan(f"{what}s/{name}.json")

    def plans(self) -> dict[str, dict[str, Any] | None]:
        """What `write_plan` left of all fleets and the like, by their files; None for one that cannot be read."""
        files = [f"{what}s/{name}" for what in PLANNED for name in self.control.within(f"{what}s").list()]
        return {f"{WORK_DIR}/{file}": self._read_plan(file) for file in files if file.endswith(".json")}

    def _read_plan(self, file: str) -> dict[str, Any] | None:
        try:
            content = json.loads(self.control.read(file))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def open_store(url: str) -> Store:
    """A store that is there. Raises: UserError if there is none at `url`, or it cannot be reached."""
    store = Store(url)
    with reaching(f"STORE {url}", "cannot be listed"):
        found = store.storage.folders()
    if not {WORK_DIR, *KINDS}.intersection(found):
        raise UserError(f"STORE {url}: is not an artifact store; nothing that `lesa-ray fleet` writes is there")
    return store


def find_run(run: str) -> tuple[str, Storage, Record]:
    """A finished stage by its folder or URL: its place, its folder, its record. Raises: UserError if it is none."""
    storage = Storage(run)
    place = "/".join(storage.url.rstrip("/").split("/")[-2:])
    with reaching(f"RUN {run}"):
        record = read_record(storage)
    if record is None:
        raise UserError(f"RUN {run}: holds no finished stage (no {RECORD_FILE}); `lesa-ray runs STORE` lists them")
    return place, storage, record


def lease_name(kind: str, digest: str) -> str:
    """What the lease of a stage is called."""
    return f"{kind}-{digest[:12]}"


def utc_now() -> str:
    """This machine's time, for people to read."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def begun_file(place: str) -> str:
    """What `Store.begin` writes, below `Store.control`."""
    return f"begun/{place}.json"
