"""A small file that changes by compare-and-swap: what leases are made of, on a folder and on S3.

`swap` replaces a file only if it still is what was read, so of several processes that read the same thing one succeeds.
How old a file is, is told by one clock, that of the storage: a process whose own clock is wrong harms nobody.

- A folder: changes are made under `flock` on a file beside it. The kernel (and NFS, since Linux 2.6.12) lets go of it
  when the process that had it dies.
- S3: `If-None-Match: *` creates, `If-Match: ETag` replaces (AWS since November 2024, MinIO, Ceph, R2). A server that
  does not know the headers ignores them and writes: `honours_conditions` finds out by trying, and leaves the answer in
  the store before the first lease, since all who share a store must go by the same rule. Such stores get
  `lesa_ray.store.claims`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from lesa_ray.checkpoint.s3_upload import http_status
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, unanswered

CONDITIONS_FILE = "conditional-writes.json"
_REFUSED = frozenset({404, 409, 412})
"""Gone; another write is under way; not what it was."""
_UNKNOWN = frozenset({400, 405, 501})
"""As servers answer that know of conditional writes but make none."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_LOCK_SECONDS = 20.0
"""One lock is of all leases of a folder, held for a write: a process that is suspended within must not stop the others
without a word."""


@dataclass(frozen=True)
class Seen:
    """A file as it was read. age: seconds since it was written, both times by the storage's clock."""

    data: bytes
    version: str
    age: float


class Unchanged:
    """For how long an observer has seen each of some files as it is, by a clock that is never set."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[str, float]] = {}

    def seconds(self, name: str, version: str) -> float:
        """Since a file was first seen with this version; 0 if that is now."""
        now = time.monotonic()
        if self._since.get(name, ("", 0.0))[0] != version:
            self._since[name] = (version, now)
        return now - self._since[name][1]


class Register(Protocol):
    """Files of a folder that change by compare-and-swap."""

    def read(self, name: str) -> Seen | None:
        """The file, or None if it is not there."""

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Write `data`, which no one wrote before, if the file's version is `expected` (None: if there is no file).

        Returns the new version; None if it was not as expected, and then nothing is written."""

    def renew(self, name: str, expected: str, data: bytes) -> str | None:
        """Make a file new, by other data or, where there is no room for any, by its time alone; else as `swap`."""


class LocalRegister:
    """On a local or shared folder."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._ahead = storage, time.time() - time.monotonic()

    def read(self, name: str) -> Seen | None:
        path = self._storage.path(name)
        try:
            with open(path, "rb") as file:
                data, written = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        version = _digest(data + written.to_bytes(16, signed=True))
        return Seen(data, version, max(0.0, self._now() - written / 1e9 - self._leapt()))

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        if expected is None:
            os.makedirs(self._storage.root, exist_ok=True)
        elif not os.path.isdir(self._storage.root):  # removed with all that lay there; it is not to come back
            return None
        with self._locked():
            if self._version(name) != expected:
                return None
            self._storage.write(name, data)
            return self._version(name)

    def renew(self, name: str, expected: str, data: bytes) -> str | None:
        try:
            return self.swap(name, expected, data)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        with self._locked():
            if self._version(name) != expected:
                return None
            os.utime(self._storage.path(name))
            return self._version(name)

    def remove(self, name: str, expected: str) -> None:
        """Remove the file if its version is `expected`: that works on a full disk too."""
        with self._locked():
            if self._version(name) == expected:
                self._storage.remove(name)

    def _version(self, name: str) -> str | None:
        seen = self.read(name)
        return None if seen is None else seen.version

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path, deadline = self._storage.path(".lock"), time.monotonic() + _LOCK_SECONDS
        with open(path, "ab") as file:
            while not _lock(file.fileno()):
                if time.monotonic() > deadline:
                    raise MachineError(f"{path}: locked by a process that is suspended, or waits for its disk")
                time.sleep(0.01)
            yield

    def _leapt(self) -> float:
        """Seconds by which the machine's clock was set forward since this object was made, or which the machine slept:
        what was written before has not aged meanwhile, as nobody could renew it."""
        return max(0.0, time.time() - time.monotonic() - self._ahead)

    def _now(self) -> float:
        """The filesystem's time: on a network filesystem the server's."""
        lock = self._storage.path(".lock")
        try:
            os.utime(lock)
            return os.stat(lock).st_mtime
        except OSError:  # not there yet, or not ours to write
            return time.time()


class S3Register:
    """On an S3 server that honours conditional writes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self, name: str) -> Seen | None:
        found = stamp(self._storage, name)
        if found is None:
            return None
        version, age = found
        try:
            # If it changes between the two requests, a swap with the older version is refused.
            return Seen(self._storage.read(name), version, age)
        except FileNotFoundError:
            return None

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        with outages(self._storage):
            try:
                version: str = put(self._storage, name, data, **condition)
                return version
            except OSError as error:
                if http_status(error) not in _REFUSED and not isinstance(error, FileExistsError | FileNotFoundError):
                    raise
        # A write whose answer was lost is sent again, and refused for its own sake.
        seen = self.read(name)
        return seen.version if seen is not None and seen.data == data else None

    def renew(self, name: str, expected: str, data: bytes) -> str | None:
        return self.swap(name, expected, data)


def register_of(storage: Storage, control: Storage) -> Register | None:
    """The register of a folder, or None if its store has no compare-and-swap.

    control: where what is found out about the store is kept."""
    if storage.is_local:
        return LocalRegister(storage)
    if storage.is_s3 and honours_conditions(control):
        return S3Register(storage)
    return None


def honours_conditions(control: Storage) -> bool:
    """Whether an S3 server refuses a conditional write whose condition does not hold; found out once for a store.

    Raises: MachineError if it does not answer; UserError if nothing may be removed there."""
    if (noted := noted_conditions(control)) is not None:
        return noted
    with outages(control):
        honoured = any(_try_conditions(control) for _ in range(2))  # once more, as a 400 may be of something else
        answer = (json.dumps({"honoured": honoured}) + "\n").encode()
        if not honoured:
            if noted_conditions(control) is None:
                control.write(CONDITIONS_FILE, answer)
        elif _is_refused(control, CONDITIONS_FILE, answer, IfNoneMatch="*") and noted_conditions(control) is None:
            control.write(CONDITIONS_FILE, answer)  # what was there could not be read
    noted = noted_conditions(control)  # of several who find out at the same time one answers for all
    return honoured if noted is None else noted


def _try_conditions(control: Storage) -> bool:
    """Whether conditions that do not hold are refused, and those that hold are not.

    Raises: UserError if what was written may not be removed, as unfinished work will have to be."""
    name = f"probe-{uuid.uuid4().hex}"
    try:
        honoured = _conditions_hold(control, name)
    except BaseException:
        with contextlib.suppress(Exception):  # what stopped it is what matters
            control.remove(name)
        raise
    try:
        control.remove(name)
    except PermissionError as error:
        raise UserError(
            f"{control.url}: may be written to, but nothing may be removed there ({explain(error)}), as unfinished "
            "work has to be in the end; allow it (s3:DeleteObject), or give another place"
        ) from error
    return honoured


def _conditions_hold(control: Storage, name: str) -> bool:
    try:
        version = put(control, name, b"1", IfNoneMatch="*")
        refuses = _is_refused(control, name, IfNoneMatch="*") and _is_refused(control, name, IfMatch='"0"')
        return refuses and not _is_refused(control, name, IfMatch=version)
    except OSError as error:
        if http_status(error) not in _UNKNOWN:
            raise
        return False


def noted_conditions(control: Storage) -> bool | None:
    """What was found out about an S3 server; None if nothing is noted, so that nobody has got a lease there yet."""
    try:
        return bool(json.loads(control.read(CONDITIONS_FILE))["honoured"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _is_refused(storage: Storage, name: str, data: bytes = b"2", **condition: str) -> bool:
    try:
        put(storage, name, data, **condition)
    except OSError as error:
        if http_status(error) in _REFUSED:
            return True
        raise
    return False


def put(storage: Storage, name: str, data: bytes, **condition: str) -> str:
    """Write an object of S3 in one request; its ETag. Raises: what s3fs makes of the answer."""
    bucket, key, _ = storage.fs.split_path(storage.path(name))
    etag: str = storage.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
    return etag


def stamp(storage: Storage, name: str) -> tuple[str, float] | None:
    """ETag of an object of S3, and the seconds since it was written by the server's clock; None if it is not there."""
    bucket, key, _ = storage.fs.split_path(storage.path(name))
    with outages(storage):
        try:
            answer: dict[str, Any] = storage.fs.call_s3("head_object", Bucket=bucket, Key=key)
        except FileNotFoundError:
            return None
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return str(answer["ETag"]), max(0.0, (now - answer["LastModified"]).total_seconds())


@contextlib.contextmanager
def outages(storage: Storage) -> Iterator[None]:
    """Raises: MachineError in place of what s3fs raises when the server does not answer."""
    try:
        yield
    except Exception as error:
        fault = None if isinstance(error, MachineError) else unanswered(storage.url, error)
        if fault is None:
            raise
        raise fault from error


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
