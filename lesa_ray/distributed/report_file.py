"""The file in which the figures of long work end: its place is tried before the work, and they outlive its refusal.

Measuring may take hours and cannot be taken up in the middle, so a place that refuses is to be found at the beginning;
and one that fails at the end (a disk that others have filled, credentials that ran out) must not take the figures with
it: they travel with the error, and the command prints them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, NotWritten, UserError
from lesa_ray.faults import explain, reaching


def try_place(out: str, folder: str) -> Storage:
    """`folder`, in which a file can be written; nothing is left there. out: what was given for it, as `--out OUT`.

    Raises: UserError if it is a file or refuses; MachineError for a full disk, or a store that does not answer."""
    where = f"--out {out}"
    try:
        storage = Storage(folder)
        with reaching(where, "cannot be written"):
            storage.list()
            storage.try_writing()
    except (UserError, MachineError) as error:  # the folder's own do not say what it is for
        raise type(error)(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    return storage


def write_report(report: Mapping[str, Any], storage: Storage, name: str) -> None:
    """Raises: NotWritten, with the report."""
    content = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    try:
        storage.write(name, content)
    except Exception as error:  # whatever it is, the figures are worth more
        raise NotWritten(f"--out {storage.url}/{name}: cannot be written ({explain(error)[:200]})", report) from error
