"""What in a store was abandoned: unfinished stages that no one works on, and uploads to S3 that were never completed.

Nothing is garbage that a lease holds or a record names. A stage is removed under its own lease, so that no fleet takes
it up meanwhile; it would lose what an interrupted run had done, no more. Folders that no fleet began are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from lesa_ray.checkpoint.s3_upload import http_status
from lesa_ray.checkpoint.storage import WORK_DIR
from lesa_ray.store.catalog import Store, lease_name
from lesa_ray.store.identity import parse_place
from lesa_ray.store.record import walk
from lesa_ray.store.register import outages

_UPLOAD_AGE_SECONDS = 24 * 3600.0
"""Uploads that belong to no stage may be some other program's; they count as abandoned after a day."""


@dataclass(frozen=True)
class Garbage:
    """Something that was abandoned. name: a stage's place or an object's key; detail: since when, or which upload."""

    kind: Literal["stage", "upload"]
    name: str
    nbytes: int
    detail: str


def find_garbage(store: Store) -> list[Garbage]:
    """What `remove` would take away. Raises: MachineError."""
    stages = [
        Garbage("stage", one.place, sum(walk(store.folder(one.place)).values()), one.failure or f"begun {one.since}")
        for one in store.unfinished()
        if store.worker(one.identity) is None
    ]
    return [*stages, *_uploads(store)]


def remove(store: Store, garbage: Garbage, holder: str) -> bool:
    """Remove what was abandoned; whether it still was. Raises: MachineError."""
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
        store.folder(garbage.name).remove_tree()
        store.forget(garbage.name)
    finally:
        lease.release()
    return True


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
