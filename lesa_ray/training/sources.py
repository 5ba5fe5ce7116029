"""Which data there are, and how they are dealt out: files, folders, globs, URLs, datasets of the hub → pieces of work.

Decides
- A piece is at most 32 MiB of files (small files together, large ones in parts), so that one huge file is shared among
  the tasks too. A part of a `.jsonl` file is the lines that begin in its range of bytes; of a `.parquet` file some of
  its row groups; of a document some of its lines; a `.jsonl.gz` file and a shard of a hub dataset are whole.
  The pieces depend on the data alone, never on the number of tasks: so the tokens are always the same.
- Folders are searched to the bottom, linked ones too, hidden files left out; the order is that of the sources, then of
  the paths. What says something of a data set (README.md, LICENSE.txt, …) is no part of it: it is left out where rows
  lie beside or below it, unless it is named itself. Files of unknown kinds are left out, too; all these are counted.
- A name that is no path here is one of the hub, `name@revision` (a commit, tag or branch) a certain one. Its commit is
  pinned when a run begins, and each task streams its shards, so nothing is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lesa_ray.checkpoint.search import find_files
from lesa_ray.checkpoint.walking import above
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.places import named, unsigned

PLAIN = (".txt", ".md", ".py")
PACKED = (".jsonl.gz", ".json.gz", ".jsonl.zst")
"""JSON Lines, packed; `.json.gz` is what some large data sets call them."""
ROWS = (".jsonl", *PACKED, ".parquet")
KINDS = (*PLAIN, *ROWS)
PIECE_BYTES = 32 * 2**20
_PIECE_FILES = 1000
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing|code_of_conduct|datasheet|dataset_?card)[^/]*\.(md|txt)",
    re.IGNORECASE,
)
_PACKINGS = frozenset({"gz", "zst", "bz2", "xz", "lz4", "zip"})
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?$")


@dataclass(frozen=True)
class Source:
    """A file, or a dataset of the hub."""

    name: str
    """URL of the file, or name of the dataset."""
    nbytes: int
    """0 where unknown."""
    mark: str
    """What changes with the content: the store's ETag, the time a local file was written, the dataset's revision."""
    given: str = ""
    """What was asked for: the file itself, its folder, a pattern."""
    shards: int = 0
    """Of a dataset of the hub; 0 for files."""

    @property
    def place(self) -> str:
        """Its name without what signs it: the same however it is reached."""
        return unsigned(self.name)

    @property
    def kind(self) -> str:
        """plain, hub, or one of ROWS."""
        if self.shards:
            return "hub"
        name = named(self.name)
        return next((end for end in ROWS if name.endswith(end)), "plain")


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` of a source; `take`: only its first so many documents."""

    source: Source
    index: int = 0
    count: int = 1
    take: int | None = None

    def span(self, total: int) -> tuple[int, int]:
        """This part of `total` things (bytes, row groups): [start, end)."""
        return self.index * total // self.count, (self.index + 1) * total // self.count

    @property
    def nbytes(self) -> int:
        start, end = self.span(self.source.nbytes)
        return end - start


@dataclass(frozen=True)
class Piece:
    """What one task tokenises."""

    parts: tuple[Part, ...]

    @cached_property
    def key(self) -> str:
        """A name for what it is made of: another if a file of it changes, the same wherever it stands in the data."""
        made_of = [[p.source.place, p.source.nbytes, p.source.mark, p.index, p.count, p.take] for p in self.parts]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def find_sources(
    names: Sequence[str],
    dataset_config: str | None,
    dataset_split: str,
    kinds: Sequence[str] = KINDS,
    unread: set[str] | None = None,
    revisions: Mapping[str, str] | None = None,
) -> list[Source]:
    """The sources behind names, each once, in their order. kinds: of files. unread: files left out are added to it.
    revisions: of datasets of the hub that are pinned already.

    Raises: UserError naming what is not there, cannot be read or holds no data; MachineError if the hub does not
    answer."""

    def sources_of(name: str, left_out: set[str]) -> list[Source]:
        sources = file_sources(name, f"DATA {name}", kinds, left_out)
        if not sources and _HUB_NAME.match(name) and not name.endswith(KINDS):
            sources = [_hub_source(name, dataset_config, dataset_split, (revisions or {}).get(name))]
        if not sources:
            raise UserError(f"DATA {name}: there is no such file or folder")
        return sources

    return each_once(names, sources_of, unread)


def each_once(
    names: Sequence[str], sources_of: Callable[[str, set[str]], list[Source]], unread: set[str] | None
) -> list[Source]:
    """The sources behind names, each once, in their order.

    sources_of: those behind a name; adds files that it leaves out to a set. unread: files that are left out behind
    every name are added to it. Raises: as `sources_of`; UserError for a dataset at two revisions."""
    found: dict[str, Source] = {}
    left_out: set[str] = set()
    for name in names:
        for source in sources_of(name, left_out):
            if found.setdefault(source.name, source).mark != source.mark and source.shards:
                raise UserError(f"DATA {name}: is given as {found[source.name].given}, too; give one revision of it")
    places: dict[str, str] = {}
    for source in found.values():
        if places.setdefault(source.place, source.name) != source.name:
            raise UserError(f"DATA {source.place}: is given twice, signed in two ways; give it once")
    if unread is not None:
        unread |= left_out - found.keys()
    return list(found.values())


def file_sources(name: str, where: str, kinds: Sequence[str] = KINDS, unread: set[str] | None = None) -> list[Source]:
    """The files behind a name; none if there is nothing. where: as messages call it. unread: files left out are added
    to it. Raises: as `find_files`."""
    files = find_files(name, kinds, where, unread)
    with_rows = {folder for url in files if url.endswith(ROWS) for folder in above(url)}
    about = {url for url in files if _ABOUT.fullmatch(url.rsplit("/", 1)[-1]) and url.rpartition("/")[0] in with_rows}
    if unread is not None:
        unread |= about
    return [
        Source(url, int(info.get("size") or 0), _mark(info), name) for url, info in files.items() if url not in about
    ]


def count_endings(names: Iterable[str]) -> dict[str, int]:
    """How many files have each ending, the most frequent first: `.csv`, `.json.bz2`, or "" for none."""
    counts = Counter(_ending(name.rsplit("/", 1)[-1]) for name in names)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _ending(name: str) -> str:
    parts = name.split(".")[1:]
    return "".join(f".{part}" for part in parts[-2 if parts and parts[-1] in _PACKINGS else -1 :])


def _mark(info: dict[str, Any]) -> str:
    known = (info.get(key) for key in ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified"))
    return str(next((value for value in known if value), "")).strip('"')


def _hub_source(name: str, config: str | None, split: str, revision: str | None) -> Source:
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise UserError(
            f"DATA {name}: there is no such file or folder; for a dataset of the Hugging Face hub, install "
            "`lesa-ray[data]`"
        ) from None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repository, _, asked = name.partition("@")
    try:
        revision = revision or HfApi().dataset_info(repository, revision=asked or None).sha or asked or "main"
        shards = open_dataset(repository, config, split, revision).num_shards
        return Source(repository, 0, revision, name, shards=shards)
    except RevisionNotFoundError as error:
        raise UserError(f"DATA {name}: the dataset {repository} has no revision {asked}") from error
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"DATA {name}: there is no such file or folder, and no such dataset on the hub") from error
    except ValueError as error:  # no such configuration or split: the message lists those there are
        raise UserError(f"DATA {name}: {explain(error)[:300]}") from error
    except Exception as error:  # the hub's clients have their own class for each way in which they may fail
        raise MachineError(
            f"DATA {name}: there is no such file or folder, and the hub cannot be asked ({explain(error)[:160]})"
        ) from error


def open_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a dataset of the hub, streamed. Raises: what `datasets` raises."""
    import datasets

    return datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)


def deal(sources: Iterable[Source], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The sources in pieces of about `piece_bytes`, in their order."""
    pieces: list[Piece] = []
    small: list[Part] = []
    held = 0

    def close() -> None:
        nonlocal held
        if small:
            pieces.append(Piece(tuple(small)))
            small.clear()
        held = 0

    for source in sources:
        count = source.shards or (1 if source.kind in PACKED else max(1, -(-source.nbytes // piece_bytes)))
        if count == 1 and 0 < source.nbytes <= piece_bytes:
            if held + source.nbytes > piece_bytes or len(small) == _PIECE_FILES:
                close()
            small.append(Part(source))
            held += source.nbytes
            continue
        close()
        for index in range(count):
            small.append(Part(source, index, count))
            close()
    close()
    return pieces
