"""Local folders that a run names, and whether another machine of the cluster has the same ones.

A task on a machine that does not share OUT would write to a folder of its own, and work of hours could not be put
together; one that lacks the base would fail by the name of a file. So who starts tasks looks at a small file of each
folder, and each task, before anything else, whether it finds that. Machines may join later, which is why tasks look
and not the command before it starts.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from lesa_ray.checkpoint.storage import Storage, split_place
from lesa_ray.errors import UnsharedError
from lesa_ray.faults import reaching
from lesa_ray.training.sources import Source

_COMPARED = 2**16
"""Bytes of a file up to which it is compared, and not only looked for."""
_LAG_SECONDS = 5.0
"""What a shared folder may take to show another machine's file."""


@dataclass(frozen=True)
class Landmark:
    """A file of a local folder, as the machine that starts the tasks sees it."""

    what: str
    """The folder as a message calls it, `OUT /data/out`."""
    path: str
    content: bytes | None
    """None: its presence will do."""

    def is_here(self) -> bool:
        try:
            if self.content is None:
                return os.path.exists(self.path)
            with open(self.path, "rb") as file:
                return file.read() == self.content
        except OSError:
            return False


def landmarks(places: Iterable[tuple[str, Storage, str]]) -> tuple[Landmark, ...]:
    """Of those places, each a folder and a file in it, that are local. Raises: as `reaching`."""
    found = []
    for what, storage, file in places:
        if storage.is_local:
            with reaching(what):
                small = (storage.size(file) or 0) <= _COMPARED
                content = storage.read(file) if small else None
            found.append(Landmark(what, storage.path(file), content))
    return tuple(found)


def data_files(sources: Iterable[Source]) -> list[tuple[str, Storage, str]]:
    """A file of each of the data that were asked for, for `landmarks`; of files named one by one, which may be many
    thousands, one of each folder, as every task looks for them all."""
    first: dict[str, str] = {}
    seen: set[str] = set()
    for source in sources:
        if not source.shards:
            folder = source.name.rpartition("/")[0]
            if folder not in seen:
                first.setdefault(source.given, source.name)
            seen.add(folder)
    return [(f"DATA {given}", *split_place(name)) for given, name in first.items()]


def check_landmarks(expected: Iterable[Landmark]) -> None:
    """Raises: UnsharedError if this machine lacks one of them."""
    deadline = time.monotonic() + _LAG_SECONDS
    for landmark in expected:
        while not landmark.is_here():
            if time.monotonic() > deadline:
                raise UnsharedError(
                    f"{landmark.what}: the machine {socket.gethostname()} does not have it, or has another; "
                    "on several machines give a folder that all of them share, or a URL such as s3://…"
                )
            time.sleep(0.5)
