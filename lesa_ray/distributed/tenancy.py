"""One command at a time works at an OUT: of two that train, the later one removes checkpoints that the earlier one is
about to export; of two that expand or tokenize, one that finds its input wrong removes what the other is working on.

A lease in a folder of OUT says who works there, from before OUT is claimed until the result is written. Who comes
second is told of the first, and stops. If the first has died, the second goes on: at once where it was a process of the
same machine, else when its lease has run out. A run whose lease has run out because the store did not answer goes on
working and renews it when the store is back; if someone else has taken OUT by then, it says so before it exports or
removes anything.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Listener
from lesa_ray.faults import reaching
from lesa_ray.store.lease import Lease, Leases

_NAME = "run"


class Tenant(Protocol):
    """Who may work at an OUT."""

    def confirm(self) -> None:
        """Make sure that nobody else works there by now. Raises: MachineError."""


class Guarded:
    """Someone else sees to it that nobody else works there."""

    def confirm(self) -> None:
        pass


class Tenancy:
    """The right to work at an OUT, by a lease."""

    def __init__(self, out: str, folder: str, listener: Listener) -> None:
        self._out, self._listener = out, listener
        self._leases = Leases(Storage(out).within(folder))
        self._lease = self._take()

    def confirm(self) -> None:
        """Make sure that nobody else works there by now. Raises: MachineError."""
        try:
            with reaching(f"OUT {self._out}", "cannot be written"):
                mine = self._lease.held or self._lease.renew()
            if not mine:
                self._lease = self._take()
        except UserError as error:  # a place that was taken before: a key or a permission that is gone since
            raise MachineError(f"{error}; the same command then goes on from here") from error

    def leave(self) -> None:
        self._lease.release()

    def _take(self) -> Lease:
        def waiting(holder: str) -> None:
            self._listener.phase(f"waiting to see whether {holder} is still at work on OUT", 0)

        with reaching(f"OUT {self._out}", "cannot be written"):
            lease = self._leases.outlive(_NAME, f"process {os.getpid()} on {socket.gethostname()}", waiting)
        if isinstance(lease, str):
            raise MachineError(
                f"OUT {self._out}: {lease} is at work on it; wait for it, or end it: the same command then goes on"
            )
        return lease


def remove_if_mine(tenant: Tenant, remove: Callable[[], None]) -> None:
    """Remove what is at an OUT, unless that is someone else's to go on with by now."""
    with contextlib.suppress(MachineError):
        tenant.confirm()
        remove()


@contextlib.contextmanager
def tenancy(out: str, folder: str, listener: Listener, given: Tenant | None = None) -> Iterator[Tenant]:
    """The right to work at `out` while the block runs, unless the caller has been `given` it already.

    folder: where below `out` the lease lies; the block may remove it with the rest of its work.
    Raises: MachineError if someone else works there."""
    if given is not None:
        yield given
        return
    found = Tenancy(out, folder, listener)
    try:
        yield found
    finally:
        found.leave()
