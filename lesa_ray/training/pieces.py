"""The first step of tokenising: a piece of the data → its ids in scratch, and their counts.

    data ──deal──▶ pieces ──tokenise_piece──▶ OUT/.lesa-ray/pieces/*.bin, *.json ──(layout.py)──▶ files of rows

Decides
- Both steps are functions of their inputs alone, so any machine can do any of the work, and do it again.
- A piece is known by what it is made of, so when a file of the data is mended the pieces of all others are still good.
- A piece's ids are left beside OUT as plain int32, a file for each split; a small record with their counts is written
  last. When all counts are known, so is every row's place in the streams, and the second step makes each file of rows
  from the bytes of ids it needs. So rows go across the bounds of files and pieces and nothing is dropped but the end of
  a stream, at the price of writing the ids once more; they go when the run is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, TypedDict

from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import UserError
from lesa_ray.training.chat import COLUMNS, ChatEncoder, conversation, fit
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.documents import Fragment, OnBad, is_heldout, read_fragments, read_rows
from lesa_ray.training.packing import Encoder, Ids, encode, hide
from lesa_ray.training.sources import Part, Piece
from lesa_ray.training.tokenizer import cached_tokenizer
from lesa_ray.training.tokens import SPLITS, TOKENIZER_DIR

PIECES = f"{WORK_DIR}/pieces"
_COUNTS = ("documents", "truncated", "left_out", "bad_rows")
TOLD = 10
"""How many rows that are wrong are told of one by one."""


@dataclass(frozen=True)
class Job:
    """What every task needs to know."""

    config: TokenizeConfig
    tokenizer: str
    """Digest of the tokenizer's files, which lie in OUT."""
    rows_per_group: int
    groups_per_file: int

    @property
    def dataset(self) -> tuple[str | None, str]:
        return self.config.dataset_config, self.config.dataset_split


class PieceRecord(TypedDict):
    """What became of a piece."""

    key: str
    counts: dict[str, int]
    bad: list[str]
    """Where rows are wrong, and how: the first few."""
    tokens: dict[str, int]
    """Ids by split."""
    largest_id: int
    lengths: dict[str, list[int]]
    """Of each example, by split (chat)."""
    digests: list[str]
    """SHA-256 of the documents of each part."""


class _Scratch:
    """The files of a piece's ids, each opened when there is something for it."""

    def __init__(self, storage: Storage, key: str, stack: ExitStack) -> None:
        self._storage, self._key, self._stack = storage, key, stack
        self._files: dict[str, IO[bytes]] = {}
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.largest_id = -1

    def add(self, split: str, ids: Ids) -> None:
        if not len(ids):
            return
        if split not in self._files:
            name = piece_file(self._key, split)
            self._files[split] = self._stack.enter_context(self._storage.create(name))
        self._files[split].write(ids.astype("<i4").tobytes())
        self.tokens[split] += len(ids)
        self.largest_id = max(self.largest_id, int(ids.max()), int((~ids).max()))  # hidden ones are complements


def piece_file(key: str, split: str) -> str:
    """Name of the ids of a piece in a split."""
    return f"{PIECES}/{key}.{split}.bin"


def piece_record(key: str) -> str:
    """Name of the record of a piece."""
    return f"{PIECES}/{key}.json"


def tokenise_piece(job: Job, piece: Piece) -> PieceRecord:
    """Read, tokenise and leave the ids in scratch. Raises: UserError naming what is wrong in the data."""
    storage = Storage(job.config.out)
    tokenizer = cached_tokenizer(f"{storage.url}/{TOKENIZER_DIR}", job.tokenizer)
    record = PieceRecord(
        key=piece.key,
        counts=dict.fromkeys(_COUNTS, 0),
        bad=[],
        tokens={},
        largest_id=-1,
        lengths={split: [] for split in SPLITS},
        digests=[],
    )
    with ExitStack() as stack:
        scratch = _Scratch(storage, piece.key, stack)
        if job.config.kind == "text":
            _tokenise_text(job, piece, Encoder.of(tokenizer, job.config.tokenizer), scratch, record)
        else:
            _tokenise_chat(job, piece, ChatEncoder(tokenizer, job.config.tokenizer), scratch, record)
        record["tokens"], record["largest_id"] = scratch.tokens, scratch.largest_id
    storage.write(piece_record(piece.key), json.dumps(record).encode())
    return record


def _on_bad(job: Job, record: PieceRecord | None = None) -> OnBad:
    """What becomes of a row that is wrong: it ends the run, or is noted in `record`."""

    def note(error: UserError) -> None:
        if job.config.bad_rows == "stop":
            raise UserError(f"{error}; or leave such rows out with --bad-rows skip") from error
        if record is not None:
            record["counts"]["bad_rows"] += 1
            if len(record["bad"]) < TOLD:
                record["bad"].append(str(error).removeprefix("DATA "))

    return note


def _tokenise_text(job: Job, piece: Piece, encoder: Encoder, scratch: _Scratch, record: PieceRecord) -> None:
    bad = _on_bad(job, record)

    def fragments() -> Iterator[Fragment]:
        for part in piece.parts:
            digest = hashlib.sha256()
            for fragment in read_fragments(part, job.config.text_column, job.dataset, bad=bad):
                _add_text(digest, fragment.text)
                record["counts"]["documents"] += fragment.begins
                yield fragment
            record["digests"].append(digest.hexdigest())

    for fragment, ids in encode(encoder, fragments()):
        scratch.add("heldout" if is_heldout(fragment.key, job.config.holdout) else "train", ids)


def _tokenise_chat(job: Job, piece: Piece, encoder: ChatEncoder, scratch: _Scratch, record: PieceRecord) -> None:
    counts, bad = record["counts"], _on_bad(job, record)
    for part in piece.parts:
        digest = hashlib.sha256()
        for row in read_rows(part, COLUMNS, job.dataset, bad):
            try:
                messages = conversation(row)
                examples = [] if messages is None else encoder(row, messages)
            except UserError as error:
                bad(error)
                continue
            counts["documents"] += 1
            if messages is None:
                counts["left_out"] += 1
                continue
            key = json.dumps([messages, row.values.get("tools")], sort_keys=True, default=str)
            _add_text(digest, key)
            split = "heldout" if is_heldout(key.encode(), job.config.holdout) else "train"
            for example in examples:
                kept = fit(example, job.config.seq_len, job.config.too_long)
                if kept is None:
                    counts["left_out"] += 1
                    continue
                counts["truncated"] += len(kept.ids) < len(example.ids)
                record["lengths"][split].append(len(kept.ids))
                scratch.add(split, hide(kept.ids, kept.scored))
        record["digests"].append(digest.hexdigest())


def _add_text(digest: Any, text: str) -> None:
    data = text.encode(errors="replace")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def count_documents(part: Part, job: Job, most: int) -> int:
    """Documents in a part, as far as `most`."""
    if part.source.kind == "plain":
        return int(part.index == 0)
    columns = (job.config.text_column,) if job.config.kind == "text" else COLUMNS
    return sum(1 for _, _ in zip(range(most), read_rows(part, columns, job.dataset, _on_bad(job)), strict=False))
