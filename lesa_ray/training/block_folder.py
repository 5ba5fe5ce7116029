"""The life of a folder of token blocks: what it depends on, claimed, valid at one moment.

While work is under way OUT holds `.lesa-ray/run.json` (whose work this is) and no manifest, so nothing can take it for
token blocks. The manifest is written last. A run that finds its own fingerprint goes on where the last one stopped, or
has nothing to do; any other content is left alone and refused. A fingerprint covers the settings and the tokenizer's
files; that of finished blocks covers also, of each file of the data, its name, its size and the store's ETag or the
time it was written. All of it is known before anything is read. Unfinished work is kept when files of the data change:
its pieces know what they were made of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, Literal

from lesa_ray import __version__
from lesa_ray.checkpoint.mark import is_free, mark, marked_by, read_mark
from lesa_ray.checkpoint.search import is_pattern
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import UserError
from lesa_ray.faults import reaching
from lesa_ray.places import shown, unsigned
from lesa_ray.training import tokens
from lesa_ray.training.chat import ChatEncoder
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.layout import Layout, Written
from lesa_ray.training.packing import Encoder
from lesa_ray.training.pieces import PIECES, TOLD, Job, PieceRecord
from lesa_ray.training.sources import KINDS, ROWS, Piece, Source, count_endings, find_sources
from lesa_ray.training.tokenizer import files_digest, load_tokenizer, tokenizer_files, vocabulary_size
from lesa_ray.training.tokens import MANIFEST, SPLITS, TOKENIZER_DIR, read_manifest

_SOURCES = "sources.jsonl"
"""Name, bytes and digest of each file that was read."""
STOP = f"{WORK_DIR}/stop"
"""Written when the data turn out to be wrong: tasks not yet begun do nothing."""
BEGUN = f"{WORK_DIR}/begun"
"""Written by the first task that begins: without it all wait for room."""
_PACKAGES = ("pyarrow", "tokenizers", "transformers")

State = Literal["fresh", "resume", "done"]


@dataclass(frozen=True)
class Run:
    """All that is known before the work begins."""

    config: TokenizeConfig
    sources: list[Source]
    tokenizer: dict[str, bytes]
    """Its files by name."""
    vocab_size: int
    pads: tuple[int, ...]
    """Ids that can fill what examples leave of a row (chat), the best first."""
    unread: dict[str, int]
    """Files that lie among the data and are left out, by ending."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the token blocks depend on, beside the data."""
        settings = {name: value for name, value in self.settings.items() if name != "bad_rows"}
        return {"format": tokens.FORMAT, "settings": settings, "tokenizer": files_digest(self.tokenizer)}

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", exclude={"out"})

    @property
    def work(self) -> str:
        """The fingerprint of the unfinished work."""
        return _fingerprint(self.identity)

    def pad(self, records: Sequence[PieceRecord]) -> int:
        """The id that fills rows: one that the model needs no larger vocabulary for than for the data, if there is."""
        largest = _largest_id(records)
        return next((pad for pad in self.pads if pad <= largest), self.pads[-1])

    @property
    def fingerprint(self) -> str:
        """That of the token blocks."""
        found = [[source.place, source.nbytes, source.mark, source.shards] for source in self.sources]
        return _fingerprint({**self.identity, "sources": found})


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def prepare(config: TokenizeConfig) -> Run:
    """Find the data and load the tokenizer. Raises: UserError if one is not there, or the tokenizer cannot serve."""
    for data in config.data:
        check_out(data, config.out)
    kinds, unread = ROWS if config.kind == "chat" else KINDS, set[str]()
    found = find_sources(config.data, config.dataset_config, config.dataset_split, kinds, unread, _pinned(config))
    tokenizer = load_tokenizer(config.tokenizer)
    Encoder.of(tokenizer, config.tokenizer)
    pads: tuple[int, ...] = ()
    if config.kind == "chat":
        encoder = ChatEncoder(tokenizer, config.tokenizer)
        pads = (encoder.pad, encoder.eos)
    return Run(config, found, tokenizer_files(tokenizer), vocabulary_size(tokenizer), pads, count_endings(unread))


def _pinned(config: TokenizeConfig) -> dict[str, str]:
    """Revisions of datasets of the hub with which unfinished work began. Where that ended at a row that is wrong, and
    such rows are not left out now, a newer revision is what can mend it."""
    storage, where = Storage(config.out), f"OUT {config.out}"
    with reaching(where):
        content = read_mark(storage, where) or {}
        if config.bad_rows == "stop" and storage.exists(STOP):
            return {}
    return dict(content.get("revisions", {}))


def made_with(manifest: dict[str, Any], config: TokenizeConfig) -> bool:
    """Whether token blocks were made with these settings; those that were not known then had their defaults."""
    if (manifest.get("bad_rows") and config.bad_rows == "stop") or manifest.get("queries") != _queries(config):
        return False
    try:
        made = TokenizeConfig.model_validate({**manifest["settings"], "out": config.out})
        asked = TokenizeConfig.model_validate(config.model_dump(mode="json"))  # as a manifest has it
    except (KeyError, TypeError, ValueError):
        return False
    return made.model_copy(update={"bad_rows": config.bad_rows, "out": asked.out}) == asked


def _queries(config: TokenizeConfig) -> str | None:
    """A digest of what tells URLs of the web apart that the settings show alike; None where nothing does."""
    told = [unsigned(data) for data in config.data]
    return None if told == list(map(shown, config.data)) else hashlib.sha256(json.dumps(told).encode()).hexdigest()


def check_out(data: str, out: str) -> None:
    """Raises: UserError if OUT is DATA or lies inside it: the next run would take what this one writes for data."""
    if "://" in data:
        inner, outer = out.rstrip("/"), data.rstrip("/")
    elif "://" in out:
        return
    else:
        inner, outer = (os.path.realpath(os.path.expanduser(place)) for place in (out, data))
    whole, _, _ = outer.partition("**")  # a pattern of all below
    if is_pattern(whole):  # others match at a certain depth, and a folder that they match is read to the bottom
        within = fnmatchcase("/".join(inner.split("/")[: outer.count("/") + 1]), outer)
    else:
        within = inner == outer or inner.startswith(whole.rstrip("/") + "/")
    if within:
        raise UserError(f"OUT {out}: lies inside DATA {data}, so it would be read as data; give a place of its own")


def out_state(storage: Storage, run: Run) -> State:
    """What OUT is to this run: fresh, resume or done. Raises: UserError if it holds anything else."""
    if is_free(storage):
        return "fresh"
    where = f"OUT {run.config.out}"
    manifest = read_manifest(storage)
    if manifest is not None:
        if manifest.get("fingerprint") == run.fingerprint:
            if (bad := manifest.get("bad_rows")) and run.config.bad_rows == "stop":
                raise UserError(
                    f"{where}: holds token blocks without the rows of the data that are wrong ({bad:,}); take them so "
                    "with --bad-rows skip, or give a new place"
                )
            return "done"
        raise UserError(f"{where}: holds token blocks of other data or settings; give a new place, or remove it")
    whose = marked_by(storage, where)
    if whose == run.work:
        return "resume"
    if whose is not None:
        raise UserError(f"{where}: holds unfinished work on other data or settings; repeat that command, or remove it")
    raise UserError(f"{where}: is not empty; give a new place, or empty it")


def claim(storage: Storage, run: Run) -> None:
    """Mark OUT as this run's, and put the tokenizer where every task finds it."""
    mark(storage, run.work, revisions={source.given: source.mark for source in run.sources if source.shards})
    storage.remove(STOP)
    for name, data in run.tokenizer.items():
        storage.write(f"{TOKENIZER_DIR}/{name}", data)


def finished_pieces(storage: Storage) -> int:
    """How many pieces of unfinished work are done."""
    return sum(name.endswith(".json") for name in storage.within(PIECES).list())


def abandon(storage: Storage) -> None:
    """Remove what this run wrote (and OUT itself, if nothing else is in it): the input turned out to be wrong."""
    for name in (WORK_DIR, TOKENIZER_DIR, *SPLITS):
        storage.remove_tree(name)
    storage.remove(_SOURCES)
    storage.remove_leftovers()
    storage.remove_if_empty()


def finish(
    storage: Storage,
    run: Run,
    job: Job,
    dealt: Sequence[Piece],
    records: Sequence[PieceRecord],
    plan: Layout,
    written: Sequence[Written],
) -> None:
    """Write the manifest: OUT is token blocks from then on."""
    config = run.config
    files = _source_records(run.sources, dealt, records)
    counts = {name: sum(record["counts"][name] for record in records) for name in records[0]["counts"]}
    splits = {}
    for split in SPLITS:
        mine = [note for note in written if note.file["name"].startswith(f"{split}/")]
        splits[split] = {
            "rows": sum(note.file["rows"] for note in mine),
            "tokens": plan.tokens[split],
            "scored": sum(note.scored for note in mine),
            "files": [note.file for note in mine],
        }
    manifest = {
        "format": tokens.FORMAT,
        "kind": config.kind,
        "seq_len": config.seq_len,
        "vocab_size": run.vocab_size,
        "largest_id": max(_largest_id(records), run.pad(records) if config.kind == "chat" else 0),
        "rows_per_group": job.rows_per_group,
        "digest": tokens.content_digest(config.kind, config.seq_len, [note.file for note in written]),
        "fingerprint": run.fingerprint,
        "documents": counts["documents"],
        "truncated": counts["truncated"],
        "left_out": counts["left_out"],
        "bad_rows": counts["bad_rows"],
        "first_bad_rows": list(islice(chain.from_iterable(record["bad"] for record in records), TOLD)),
        "dropped_tokens": plan.dropped,
        "heldout_from_end": plan.heldout_from_end,
        "splits": splits,
        "tokenizer": files_digest(run.tokenizer),
        "settings": run.settings,
        **({} if (queries := _queries(config)) is None else {"queries": queries}),
        "packages": {"lesa-ray": __version__} | {name: version(name) for name in _PACKAGES},
        "sources": _summary(files),
        "unread_files": run.unread,
    }
    storage.write(_SOURCES, b"".join(_written(file) for file in files))
    for folder in ("", TOKENIZER_DIR, *SPLITS):
        storage.within(folder).remove_leftovers()
    storage.write(MANIFEST, _written(manifest, indent=1))
    storage.remove_tree(WORK_DIR)


def _written(value: object, indent: int | None = None) -> bytes:
    """JSON and a line's end. What in the name of a file is no UTF-8, Python has as halves of surrogate pairs; they
    become JSON's escapes, which read as what they were."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _largest_id(records: Sequence[PieceRecord]) -> int:
    return max(record["largest_id"] for record in records)


def _source_records(
    found: list[Source], dealt: Sequence[Piece], records: Sequence[PieceRecord]
) -> list[dict[str, Any]]:
    """Name, bytes and digest of each source: SHA-256 of the documents read from it, or of its parts' digests."""
    digests: dict[str, list[str]] = {source.name: [] for source in found}
    for piece, record in zip(dealt, records, strict=True):
        for part, digest in zip(piece.parts, record["digests"], strict=True):
            digests[part.source.name].append(digest)
    return [
        {
            "name": shown(source.name),
            "given": shown(source.given),
            "bytes": source.nbytes,
            "digest": parts[0] if len(parts) == 1 else _together(parts),
        }
        for source in found
        if (parts := digests[source.name])
    ]


def _summary(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for each of DATA: a folder may have so many files that the manifest is no place for their names."""
    by_given: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        by_given.setdefault(file["given"], []).append(file)
    return [
        {
            "name": given,
            "files": len(mine),
            "bytes": sum(file["bytes"] for file in mine),
            "digest": _together([file["digest"] for file in mine]),
        }
        for given, mine in by_given.items()
    ]


def _together(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
