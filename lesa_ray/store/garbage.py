"""What in a store was abandoned: unfinished stages that no one works on, and uploads to S3 that were never completed.

Nothing is garbage that a lease holds or a record names, or that was worked on in the last days: a fleet that was
interrupted or has failed lets go of its leases, and the same command goes on with what is there. A stage is removed
under its own lease, so that no fleet takes it up meanwhile. Folders that no fleet began are left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from lesa_ray.checkpoint.s3_upload import http_status
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import MachineError
from lesa_ray.store.catalog import Begun, Store, lease_name
from lesa_ray.store.identity import parse_place
from lesa_ray.store.register import outages

_UPLOAD_AGE_SECONDS = 24 * 3600.0
"""Uploads that belong to no stage may be some other program's; they count as abandoned after a day."""


_TIMES = ("LastModified", "last_modified", "mtime")
"""What filesystems call the time at which a file was written."""


class NotRemoved(MachineError):
    """A stage of which something stays, as it is somebody else's."""


@dataclass(frozen=True)
class Garbage:
    """Something abandoned, or finished and not needed (`lesa_ray.store.superseded`). name: a stage's place or
    an object's key; detail: since when, or which upload."""

    kind: Literal["stage", "upload", "finished"]
    name: str
    nbytes: int
    detail: str


def find_garbage(store: Store, days: float = 7.0) -> list[Garbage]:
    """What `remove` would take away; of stages those nobody has worked on for so many days. Raises: MachineError."""
    stages = []
    for one in store.unfinished():
        if age(_since(one)) < days or store.worker(one.identity) is not None:
            continue
        nbytes, written = _files(store, one.place)
        if age(written) >= days:
            stages.append(Garbage("stage", one.place, nbytes, one.failure or f"begun {one.since}"))
    return [*stages, *_uploads(store)]


def remove(store: Store, garbage: Garbage, holder: str) -> bool:
    """Remove what was abandoned; whether it still was. Raises: NotRemoved; MachineError."""
    if garbage.kind == "upload":
        bucket, key, _ = store.storage.fs.split_path(store.storage.path(garbage.name))
        with outages(store.storage):
            try:
                store.storage.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=garbage.detail)
            except FileNotFoundError:
                return False
        return True
    begun = store.begun(garbage.name)
    if begun is None:
        return False
    lease = store.lease(begun.identity, holder)
    if lease is None:
        return False
    try:
        if store.record(garbage.name) is not None:
            return False
        clear(store.folder(garbage.name))
        store.forget(garbage.name)
    finally:
        lease.release()
    return True


def clear(folder: Storage) -> None:
    """Remove a stage's folder. Raises: NotRemoved if something of it stays; MachineError."""
    try:
        folder.remove_tree()
        stays = bool(folder.list() or folder.folders())
    except PermissionError:
        stays = True
    if stays:
        raise NotRemoved(f"{folder.url}: could not be removed whole; repeat it as a user who may write in all of it")


def _since(begun: Begun) -> float:
    """When work on a stage last began or was stopped, in seconds of the clock of who noted it."""
    return datetime.fromisoformat(begun.since).timestamp()


def _files(store: Store, place: str) -> tuple[int, float]:
    """Bytes below a stage's folder, and when the newest of its files was written, as the store tells it; 0 if it tells
    no times, or there is no file."""
    folder = store.folder(place)
    with outages(folder):
        found = folder.fs.find(folder.root, detail=True).values()
    times = (next((info[name] for name in _TIMES if info.get(name)), 0.0) for info in found)
    newest = max((at.timestamp() if isinstance(at, datetime) else float(at) for at in times), default=0.0)
    return sum(int(info["size"] or 0) for info in found), newest


def age(seconds: float) -> float:
    """Days since a time."""
    return (time.time() - seconds) / 86400


def _uploads(store: Store) -> Iterator[Garbage]:
    """Uploads below the store that were begun and neither completed nor aborted."""
    storage = store.storage
    if not storage.is_s3:
        return
    bucket, prefix, _ = storage.fs.split_path(storage.path("x"))
    prefix = prefix[:-1]
    for upload in _list_uploads(store, bucket, prefix):
        name = str(upload["Key"]).removeprefix(prefix)
        place = parse_place("/".join(name.split("/")[:2]))
        if place is not None and store.leases.holder(lease_name(place[0], place[2])) is not None:
            continue
        begun: datetime = upload["Initiated"]
        ours = place is not None or name.startswith(f"{WORK_DIR}/")
        if ours or (datetime.now(UTC) - begun).total_seconds() > _UPLOAD_AGE_SECONDS:
            yield Garbage("upload", name, _uploaded(store, upload, bucket), str(upload["UploadId"]))


def _list_uploads(store: Store, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    marker: dict[str, str] = {}
    while True:
        with outages(store.storage):
            try:
                page = store.storage.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            except FileNotFoundError:
                return  # as servers answer that keep no list of them (rclone's)
            except OSError as error:
                if http_status(error) in (405, 501):
                    return
                raise
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _uploaded(store: Store, upload: dict[str, Any], bucket: str) -> int:
    """Bytes of an upload's parts."""
    total, marker = 0, 0
    while True:
        with outages(store.storage):
            try:
                page = store.storage.fs.call_s3(
                    "list_parts", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"], PartNumberMarker=marker
                )
            except FileNotFoundError:
                return total  # completed or aborted meanwhile
        total += sum(int(part["Size"]) for part in page.get("Parts", []))
        if not page.get("IsTruncated"):
            return total
        marker = int(page["NextPartNumberMarker"])
