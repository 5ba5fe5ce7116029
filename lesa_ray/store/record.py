"""The record of a finished stage, `stage.json`: written last, and from then on its folder is not written again.

It says what made the output (inputs, settings, versions of code and packages), what came of it (metrics, seconds) and
what it is made of: the size and SHA-256 of every file. The bytes are read back for it, some 1 GB/s of local disk and
what the network gives of an object store, which also shows that what was written can be read. Training checkpoints have
their size alone: they are many times what was exported of them, no other stage reads them, and the stage, with all
that waits for it, is finished only when the last byte was read.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.store.identity import Identity, canonical

RECORD_FILE = "stage.json"
FORMAT = 1
_PACKAGES = ("torch", "ray", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")
_CHUNK = 16 * 2**20
_THREADS = 16
"""A connection to an object store brings 50 to 100 MB/s."""
_BY_SIZE = "training/checkpoints/"
_LAST = ("config.json", "manifest.json", "evaluation.json")
"""What the commands write last: a listing with it is of the finished folder."""
_LISTING_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)


class FileRecord(TypedDict):
    """A file of the output, by its name in the record."""

    bytes: int
    sha256: str | None
    """None: only the size is kept."""


class Record(TypedDict):
    """The content of `stage.json`."""

    format: int
    label: str
    digest: str
    """SHA-256 of `identity`."""
    identity: dict[str, Any]
    """Kind, inputs, settings that count, version of the code."""
    given: dict[str, Any]
    """All settings as the command got them: where its inputs lay, and what does not count."""
    sources: str
    """SHA-256 of the code's own files."""
    packages: dict[str, str]
    started: str
    """ISO 8601, UTC, by the clock of the machine that did the work."""
    seconds: float
    """From the start of the last attempt; what an interrupted one did before is not in it."""
    metrics: dict[str, Any]
    bytes: int
    files: dict[str, FileRecord]


def make_record(
    identity: Identity,
    label: str,
    *,
    given: Mapping[str, Any],
    started: str,
    seconds: float,
    metrics: Mapping[str, Any],
    files: dict[str, FileRecord],
) -> Record:
    """Everything that is known of a stage that has just ended, on the machine and with the code that did it."""
    return Record(
        format=FORMAT,
        label=label,
        digest=identity.digest,
        identity=identity.content,
        given=_plain(given),
        sources=sources_digest(),
        packages=_packages(),
        started=started,
        seconds=round(seconds, 3),
        metrics=_plain(metrics),
        bytes=sum(file["bytes"] for file in files.values()),
        files=dict(sorted(files.items())),
    )


def write_record(storage: Storage, record: Record) -> None:
    """Make the folder a finished stage's. Raises: MachineError if it is that already."""
    there = read_record(storage)
    if there is not None and there["digest"] == record["digest"]:
        raise MachineError(f"{storage.url}: is finished already; a finished stage is never written again")
    storage.write(RECORD_FILE, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_record(storage: Storage) -> Record | None:
    """The record of a folder; None if there is none, so that the stage is not finished.

    Raises: UserError if it is damaged or of another format."""
    try:
        content = json.loads(storage.read(RECORD_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(
            f"{storage.url}/{RECORD_FILE}: is damaged ({error}); remove the folder to make it anew"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{storage.url}/{RECORD_FILE}: is not a record of format {FORMAT}")
    record: Record = content  # type: ignore[assignment]
    if hashlib.sha256(canonical(record["identity"])).hexdigest() != record["digest"]:
        raise UserError(f"{storage.url}/{RECORD_FILE}: its identity does not have its digest; it was changed by hand")
    return record


def describe_files(storage: Storage) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file below a finished folder but the record, by name relative to it.

    Listings of some stores lag behind: one that lacks what was written last is asked for again, and a file that is
    listed and gone is left out. Raises: MachineError if the listing stays behind for half a minute."""
    last = {name for name in _LAST if storage.exists(name)}
    for pause in (*_LISTING_PAUSES, None):
        names = [name for name in walk(storage) if name != RECORD_FILE]
        if names and last.issubset(names):
            break
        if pause is None:
            raise MachineError(
                f"{storage.url}: the store's listing lacks files that are there; the same command goes on"
            )
        time.sleep(pause)
    with ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(lambda name: _describe(storage, name, read=not name.startswith(_BY_SIZE)), names)
        found = zip(names, described, strict=True)
        return {name: file for name, file in found if file is not None}


def compare_files(storage: Storage, record: Record) -> list[str]:
    """What of a finished stage is not as its record says, a line each; empty if every byte is.

    Files whose size is right are read whole, unless the record has their size alone."""
    expected = record["files"]
    found = walk(storage)
    for name in expected.keys() - found.keys():  # a listing may lag behind
        if (size := storage.size(name)) is not None:
            found[name] = size
    wrong = [f"{name}: is not in the record" for name in found if name not in expected and name != RECORD_FILE]
    same_size = []
    for name, file in expected.items():
        if name not in found:
            wrong.append(f"{name}: is missing")
        elif found[name] != file["bytes"]:
            wrong.append(f"{name}: has {found[name]} bytes, not {file['bytes']}")
        elif file["sha256"] is not None:
            same_size.append(name)
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, now in zip(same_size, pool.map(lambda name: _describe(storage, name), same_size), strict=True):
            if now is None or now["sha256"] != expected[name]["sha256"]:
                wrong.append(f"{name}: has other content")
    return sorted(wrong)


def walk(storage: Storage) -> dict[str, int]:
    """All files below a folder with their sizes, by name relative to it; what a killed write left is passed over."""
    return dict(sorted(_walk(storage, "")))


def _walk(storage: Storage, prefix: str) -> Iterator[tuple[str, int]]:
    for name, size in storage.list().items():
        if not (name.startswith(".") and name.endswith(".tmp")):
            yield prefix + name, size
    for folder in storage.folders():
        yield from _walk(storage.within(folder), f"{prefix}{folder}/")


def _describe(storage: Storage, name: str, read: bool = True) -> FileRecord | None:
    """None if it is not there."""
    digest, nbytes = hashlib.sha256(), 0
    size = storage.size(name)
    if size is None:
        return None
    if not read:
        return FileRecord(bytes=size, sha256=None)
    while nbytes < size:
        data = storage.read(name, nbytes, min(size, nbytes + _CHUNK))
        if not data:
            break
        digest.update(data)
        nbytes += len(data)
    return FileRecord(bytes=nbytes, sha256=digest.hexdigest())


@cache
def sources_digest() -> str:
    """SHA-256 of this package's Python files: which code it was, where a version number does not say enough."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """JSON values, without numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
