"""Leases: of all processes that share a store, one at a time works on a stage.

A lease is a file in the store that its holder renews, by a thread, four times in a term. When the holder dies the file
grows old; who then wants it takes it over. Three rules make that safe:

- How old it is, is judged by the storage's clock, or the observer's; never by what the holder says of its own. What an
  observer has seen unchanged for a term by its own steady clock is as old as that, whatever a clock that was set back
  says; and what a folder's clock leapt forward while it looked on makes nothing old.
- The holder counts itself as one only until seven tenths of the term after the *start* of its last renewal that
  succeeded, by its own steady clock; so it has stopped before anyone takes over, even if the store did not answer.
- A lease that was taken over is not renewed: its holder learns of it and stops.

A holder may name its process. On the same machine the lease is then that process's as long as it lives, suspended or
with its store away, and free at once when it has ended. Such a holder goes on renewing what has run out, as long as
nobody has taken it over.

They assume clocks that run at the same rate and a write that takes effect within three tenths of the term. A process
that is suspended in the middle of its work can still write when it wakes: what stages write is the same bytes under the
same names, each whole, so that does no harm.

Where the storage has compare-and-swap, taking and renewing are swaps (`lesa_ray.store.register`); elsewhere they are
claims (`lesa_ray.store.claims`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError
from lesa_ray.store.claims import Claims, StoreClock
from lesa_ray.store.process import HERE, Process, holder_is_alive, this_process
from lesa_ray.store.register import LocalRegister, Register, Seen, Unchanged, noted_conditions, register_of

TERM_SECONDS = 120.0
_SLACK_SECONDS = 1.0  # S3 tells times in whole seconds
_VALID, _RENEWALS = 0.7, 4
_LOG = logging.getLogger(__name__)


class Lease:
    """A lease that was got. `held` says whether it still is this process's; to be asked often."""

    def __init__(
        self,
        name: str,
        owner: str,
        term: float,
        since: float,
        renew: Callable[[bool], bool],
        release: Callable[[], None],
        *,
        lasting: bool,
    ) -> None:
        """since: when the request that got it began. renew: whether it is still this holder's, told whether it has run
        out meanwhile; may raise MachineError. lasting: whether one that has run out is renewed."""
        self.name = name
        self._owner, self._term, self._renew, self._release = owner, term, renew, release
        self._lasting = lasting
        self._valid_until = since + _VALID * term
        self._stop, self._one_at_a_time = threading.Event(), threading.Lock()
        HERE.add(owner)
        self._thread = threading.Thread(target=self._keep, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        return time.monotonic() < self._valid_until

    def release(self) -> None:
        """Let others have it. A store that does not answer is no fault: the lease runs out by itself."""
        self._stop.set()
        self._thread.join(timeout=self._term)
        HERE.discard(self._owner)
        if self.held and not self._thread.is_alive():
            self._valid_until = 0.0
            with contextlib.suppress(MachineError, OSError):
                self._release()

    def renew(self) -> bool:
        """Renew it now; whether it is held then. False for good if someone else has it.

        Raises: MachineError, or what else the storage does, if that does not answer."""
        with self._one_at_a_time:
            begin, in_time = time.monotonic(), self.held
            if not in_time and not self._lasting:
                return False
            if not self._renew(not in_time):
                self._valid_until = 0.0
                self._stop.set()
            elif self.held or self._lasting:  # of others' an answer that late is of a lease that someone may have
                self._valid_until = begin + _VALID * self._term
            return self.held

    def _keep(self) -> None:
        while not self._stop.wait(self._term / _RENEWALS) and (self.held or self._lasting):
            try:
                self.renew()
            except Exception as error:  # whatever it is, only a renewal that succeeded counts
                _LOG.debug("lease %s: not renewed: %s", self.name, error)


class Leases:
    """The leases of a store: small files in a folder of it."""

    def __init__(self, control: Storage, term: float = TERM_SECONDS) -> None:
        """control: the store's folder for such things. term: seconds after which the lease of a dead holder is free."""
        self._control, self._storage, self._term = control, control.within("leases"), term
        self._unchanged, self._clock = Unchanged(), StoreClock(self._storage)
        self._chosen: Register | None = None
        self._knows = False

    @property
    def _register(self) -> Register | None:
        if not self._knows:
            self._chosen, self._knows = register_of(self._storage, self._control), True
        return self._chosen

    def acquire(self, name: str, holder: str, process: Process | None = None) -> Lease | None:
        """The lease `name` for this process, or None if someone has it.

        holder: what others are told of who has it. process: whose it is as long as it lives, on the same machine.
        Raises: MachineError if the store does not answer."""
        register = self._register  # what is found out about the store is no part of the lease's time
        begin, told = time.monotonic(), {"holder": holder, "process": process, "owner": uuid.uuid4().hex}
        if register is None:
            return self._claim(name, told, begin)
        return self._swap_in(register, name, told, begin)

    def outlive(self, name: str, holder: str, waiting: Callable[[str], None]) -> Lease | str:
        """The lease `name`, at once or when its holder turns out to be dead; else who has it, and lives.

        Dead is a process of this machine that has ended, or a holder that does not renew for a whole term; this waits
        for that, or for a renewal. waiting: is told for whom. Raises: MachineError if the store does not answer."""
        process, before = this_process(), None
        while True:
            lease = self.acquire(name, holder, process)
            if lease is not None:
                return lease
            found = self._held(name)
            if found is not None:
                held, version = found
                if holder_is_alive(held) or before not in (None, version):
                    return str(held["holder"])
                if before is None:
                    waiting(str(held["holder"]))
                before = version
            time.sleep(min(2.0, self._term / 20))

    def holder(self, name: str) -> str | None:
        """Who has a lease now; None if no one."""
        found = self._held(name)
        return None if found is None else str(found[0]["holder"])

    def _held(self, name: str) -> tuple[dict[str, Any], str] | None:
        """What the holder of a lease says of itself, and what changes with each renewal; None if no one has it. Nothing
        is written: who only looks may have no right to."""
        if not self._knows and self._storage.is_s3 and noted_conditions(self._control) is None:
            return None
        if self._register is None:
            held = self._claims(name).held()
            return None if held is None else (held, held["nonce"])
        seen = self._register.read(f"{name}.json")
        return (json.loads(seen.data), seen.version) if seen is not None and self._is_live(name, seen) else None

    def _claims(self, name: str) -> Claims:
        return Claims(self._storage.within(name), _SLACK_SECONDS, self._unchanged, self._clock)

    def _is_live(self, name: str, seen: Seen) -> bool:
        content = json.loads(seen.data)
        if content["released"]:
            return False
        alive = holder_is_alive(content)
        if alive is not None:
            return alive
        age = max(seen.age, self._unchanged.seconds(name, seen.version))
        return bool(age <= content["term"] + _SLACK_SECONDS)

    def forget(self, name: str) -> None:
        """Remove what is left of a lease that no one will want any more."""
        self._storage.remove(f"{name}.json")
        self._storage.remove_tree(name)

    def _claim(self, name: str, told: Mapping[str, Any], begin: float) -> Lease | None:
        claims = self._claims(name)
        if not claims.take(told, self._term):
            return None

        def renew(late: bool) -> bool:
            if late:
                return claims.take_again(told, self._term)
            if not claims.stands():
                return False
            claims.write(told, self._term, held=True)
            return True

        if time.monotonic() > begin + _VALID * self._term:
            claims.withdraw()
            return None
        lasting = told["process"] is not None
        return Lease(name, told["owner"], self._term, begin, renew, claims.withdraw, lasting=lasting)

    def _swap_in(self, register: Register, name: str, told: Mapping[str, Any], begin: float) -> Lease | None:
        file, owner = f"{name}.json", str(told["owner"])

        def content(*, released: bool) -> bytes:
            fields = {**told, "term": self._term, "released": released, "nonce": uuid.uuid4().hex}
            return (json.dumps(fields) + "\n").encode()

        seen = register.read(file)
        if seen is not None and self._is_live(name, seen):
            return None
        got = register.swap(file, seen.version if seen else None, content(released=False))
        if got is None:
            return None
        version = got

        def change(by: Callable[[str, str, bytes], str | None], *, released: bool) -> bool:
            nonlocal version
            after = by(file, version, content(released=released))
            if after is None:  # taken over; or a renewal whose answer never came was made after all
                seen = register.read(file)
                if seen is not None and json.loads(seen.data)["owner"] == owner:
                    after = by(file, seen.version, content(released=released))
            version = after or version
            return after is not None

        def let_go() -> None:
            try:
                change(register.swap, released=True)
            except OSError:
                if not isinstance(register, LocalRegister):
                    raise
                register.remove(file, version)

        def renew(late: bool) -> bool:
            return change(register.renew, released=False)

        return Lease(name, owner, self._term, begin, renew, let_go, lasting=told["process"] is not None)
