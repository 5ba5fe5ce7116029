"""Whose unfinished work a folder holds: a small file that is there before anything else is."""

from __future__ import annotations

import json
from typing import Any

from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import UserError

LEASE_DIR = f"{WORK_DIR}/lease"
"""Says who is at work in the folder, from before it is marked."""
MARK_FILE = f"{WORK_DIR}/run.json"


def mark(storage: Storage, fingerprint: str, **more: Any) -> None:
    """Write it; `more`: what else is to be known of the work, as JSON."""
    storage.write(MARK_FILE, (json.dumps({"fingerprint": fingerprint, **more}) + "\n").encode())


def is_free(storage: Storage) -> bool:
    """Whether a folder holds nothing, or no more than the lease of someone who has not marked it yet, or never did."""
    if storage.is_empty():
        return True
    work = storage.within(WORK_DIR)
    files = [name for name in (*storage.list(), *work.list()) if not name.endswith(".tmp")]  # a killed write's
    return not files and {*storage.folders(), *work.folders()} <= {WORK_DIR, LEASE_DIR.rpartition("/")[2]}


def marked_by(storage: Storage, where: str) -> str | None:
    """The fingerprint of whoever marked the folder, None if nobody did.

    where: as a message calls the folder. Raises: UserError if the file is damaged."""
    content = read_mark(storage, where)
    return None if content is None else str(content["fingerprint"])


def read_mark(storage: Storage, where: str) -> dict[str, Any] | None:
    """All that `mark` has written. Raises: as `marked_by`."""
    if not storage.exists(MARK_FILE):
        return None
    try:
        content = json.loads(storage.read(MARK_FILE))
        return {**content, "fingerprint": content["fingerprint"]}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{where}: its {MARK_FILE} is damaged; remove OUT, or give a new place") from None
