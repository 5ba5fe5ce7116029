"""What identifies a fleet's inputs: checkpoints, tokenizers, text. From headers, listings and small files alone.

Where something lies does not count, what it is does: the store's ETag or blob id, the hub's revision, and on local
disks the time a file of text was written, or samples of a checkpoint's bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.manifest import MANIFEST_FILE, read_manifest
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.search import is_pattern
from lesa_ray.checkpoint.storage import Storage, read_file, resolve_base
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import reaching

if TYPE_CHECKING:
    from lesa_ray.training.sources import Source

_TOKENIZER = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*"
    r"|spiece\.model|tekken\.json|.*\.tiktoken"
)
_BLOCKS = "manifest.json"


def checkpoint_identity(name: str) -> dict[str, Any]:
    """A checkpoint's shards, configuration and tokenizer. Raises: UserError if it is none; MachineError."""
    checkpoint = open_checkpoint(name)
    config = hashlib.sha256(checkpoint.storage.read("config.json")).hexdigest()
    return {"config": config, "shards": checkpoint.digests(), "tokenizer": _tokenizer_digest(checkpoint.storage)}


def grown_identity(name: str, identity: Future[dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint's identity, if that says which of its layers are new. Raises: UserError if it does not, and what
    finding out the identity raises."""
    found = identity.result()
    where = f"checkpoint {name}"
    with reaching(where):
        manifest = read_manifest(Storage(resolve_base(name, where)))
    if manifest is None:
        raise UserError(
            f"{where}: has no {MANIFEST_FILE}, so which layers are new is not known; expand it first, or say what to "
            "train (train: all)"
        )
    return found


def tokenizer_identity(name: str) -> str:
    """SHA-256 over a tokenizer's files. Raises: UserError if there are none."""
    where = f"tokenizer {name}"
    storage = Storage(resolve_base(name, where))
    with reaching(where):
        digest = _tokenizer_digest(storage)
    if digest is None:
        raise UserError(f"{where}: there is no tokenizer in it")
    return digest


def _tokenizer_digest(storage: Storage) -> str | None:
    names = sorted(name for name in storage.list() if _TOKENIZER.fullmatch(name))
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{hashlib.sha256(storage.read(name)).hexdigest()}\0".encode())
    return digest.hexdigest() if names else None


def file_identity(name: str) -> str:
    """SHA-256 of a small file. Raises: UserError if it cannot be read; MachineError."""
    return hashlib.sha256(read_file(name, name)).hexdigest()


def data_identity(names: Sequence[str], dataset_config: str | None = None, dataset_split: str = "train") -> Any:
    """Token blocks by their digest; else each file, or data set of the hub, in its order.

    Raises: UserError if something is not there or holds no data; MachineError."""
    if len(names) == 1 and (digest := _blocks_digest(names[0])) is not None:
        return {"blocks": digest}
    from lesa_ray.training.sources import find_sources

    found = find_sources(names, dataset_config, dataset_split)
    return [[_known_as(source), source.nbytes, source.mark, source.shards] for source in found]


def _known_as(source: Source) -> str:
    """A file wherever it lies; a data set by its whole name, which finds the commit that it is read at."""
    return source.place if source.shards else source.place.rsplit("/", 1)[-1]


def pinned(data: str | tuple[str, ...], found: Sequence[Any]) -> str | tuple[str, ...]:
    """Data as a stage is given them: data sets of the hub at the commits that identify them, as there may be newer ones
    by the time it begins. found: what `data_identity` said of them."""
    commits: dict[str, set[str]] = {}
    for name, _, mark, shards in found:
        if shards:
            commits.setdefault(name, set()).add(mark)

    def is_place(name: str) -> bool:
        return "://" in name or name.startswith("/")

    def at_commit(name: str) -> str:
        repository = name.partition("@")[0]
        marks = set() if is_place(name) else commits.get(repository, set())
        return f"{repository}@{min(marks)}" if len(marks) == 1 else name

    return at_commit(data) if isinstance(data, str) else tuple(map(at_commit, data))


def _blocks_digest(name: str) -> str | None:
    """The digest of token blocks; None if it is something else."""
    if is_pattern(name) or name.startswith(("http://", "https://")):
        return None
    try:
        manifest = json.loads(Storage(name).read(_BLOCKS))
        return str(manifest["digest"]) if "seq_len" in manifest else None
    except MachineError:
        raise
    except Exception:  # find_sources says what is wrong with the place
        return None
