"""The second step of tokenising: which ids go into which row of which file, and writing a file.

Decides
- A file holds 64 row groups, 2**26 tokens. The layout depends on the counts of the pieces alone.
- Held out is a share of the documents. Where they do not fill a row, the end of the data is held out in their place:
  that share of the tokens (conversations: of the examples). The cut then lies within a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.training.packing import Ids, fill_rows, pack_examples
from lesa_ray.training.pieces import Job, PieceRecord, piece_file
from lesa_ray.training.tokens import SPLITS, UNSCORED, FileRecord, Rows, write_rows

FILES = f"{WORK_DIR}/files"
GROUPS_PER_FILE = 64
_GAP = 2**16
"""Ids that are read for nothing rather than asked for in a request of their own."""


@dataclass(frozen=True)
class Stretch:
    """`count` ids from `start` on of a file in scratch."""

    file: str
    start: int
    count: int


class Stream:
    """Stretches, one after another."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._stretches = stretches
        self._ends = np.cumsum([stretch.count for stretch in stretches], dtype=np.int64)
        self.total = int(self._ends[-1]) if len(stretches) else 0

    def cut(self, start: int, end: int) -> list[Stretch]:
        """The ids from `start` to `end` of the stream."""
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < end:
            stretch = self._stretches[index]
            skip = start - (int(self._ends[index]) - stretch.count)
            count = min(stretch.count - skip, end - start)
            found.append(Stretch(stretch.file, stretch.start + skip, count))
            start, index = start + count, index + 1
        return found


@dataclass(frozen=True)
class FilePlan:
    """A file of rows to write. Text: its ids are those of `stretches`, one after another. Chat: row r holds the
    examples stretches[starts[r] : starts[r + 1]], and what is left of it is filled with `pad`."""

    name: str
    rows: int
    stretches: tuple[Stretch, ...]
    made_of: str
    """As the layout's."""
    starts: tuple[int, ...] = ()
    pad: int = 0

    @property
    def record(self) -> str:
        """Where it is noted that the file is done: not where the file of the same name of other pieces was."""
        return f"{FILES}/{self.made_of}/{self.name.replace('/', '-')}.json"


@dataclass(frozen=True)
class Layout:
    """All files of rows, and what of each split is in them."""

    files: tuple[FilePlan, ...]
    tokens: dict[str, int]
    """By split, without padding."""
    dropped: dict[str, int]
    """Tokens by split that fill no row."""
    heldout_from_end: int
    """Tokens (chat: examples) at the end of the data that are held out in place of whole documents."""
    made_of: str
    """Name of the pieces of the data, all together."""


def plan_text(job: Job, records: Sequence[PieceRecord]) -> Layout:
    """Cut the streams into rows. Raises: UserError if there is not one row to train on."""
    seq_len = job.config.seq_len
    streams = {
        split: Stream(
            [
                Stretch(piece_file(record["key"], split), 0, record["tokens"][split])
                for record in records
                if record["tokens"][split]
            ]
        )
        for split in SPLITS
    }
    train, heldout = streams["train"], streams["heldout"]
    moved = 0
    if job.config.holdout and heldout.total < seq_len:
        share = job.config.holdout * (train.total + heldout.total)
        wanted = max(1, round(share / seq_len)) * seq_len - heldout.total
        if train.total - wanted >= seq_len:
            moved, end = wanted, train.total - wanted
            streams["heldout"] = Stream(train.cut(end, train.total) + heldout.cut(0, heldout.total))
            streams["train"] = Stream(train.cut(0, end))
    if streams["train"].total < seq_len:
        raise UserError(
            f"DATA {' '.join(job.config.data)}: gives {train.total} tokens to train on, less than one row of {seq_len} "
            "(seq_len); give more data or shorter rows"
        )
    files, made_of = [], _together(records)
    for split, stream in streams.items():
        for name, first, last in _files(job, split, stream.total // seq_len):
            stretches = tuple(stream.cut(first * seq_len, last * seq_len))
            files.append(FilePlan(name, last - first, stretches, made_of))
    tokens = {split: stream.total // seq_len * seq_len for split, stream in streams.items()}
    dropped = {split: stream.total - tokens[split] for split, stream in streams.items()}
    return Layout(tuple(files), tokens, dropped, moved, made_of)


def plan_chat(job: Job, records: Sequence[PieceRecord], pad: int) -> Layout:
    """Pack the examples into rows. Raises: UserError if there is none to train on."""
    examples: dict[str, list[Stretch]] = {split: [] for split in SPLITS}
    for record in records:
        for split in SPLITS:
            at, file = 0, piece_file(record["key"], split)
            for length in record["lengths"][split]:
                examples[split].append(Stretch(file, at, length))
                at += length
    moved = 0
    if job.config.holdout and not examples["heldout"]:
        wanted = max(1, round(job.config.holdout * len(examples["train"])))
        if len(examples["train"]) > wanted:
            moved = wanted
            examples["heldout"] = examples["train"][-wanted:]
            examples["train"] = examples["train"][:-wanted]
    if not examples["train"]:
        raise UserError(
            f"DATA {' '.join(job.config.data)}: has no conversation with an answer to train on that fits in a row of "
            f"{job.config.seq_len} tokens (seq_len)"
        )
    files, made_of = [], _together(records)
    for split in SPLITS:
        packed = pack_examples([example.count for example in examples[split]], job.config.seq_len)
        for name, first, last in _files(job, split, packed.rows):
            starts = packed.starts[first : last + 1]
            chosen = tuple(examples[split][index] for index in packed.examples[starts[0] : starts[-1]])
            files.append(FilePlan(name, last - first, chosen, made_of, tuple((starts - starts[0]).tolist()), pad))
    tokens = {split: sum(example.count for example in examples[split]) for split in SPLITS}
    return Layout(tuple(files), tokens, dict.fromkeys(SPLITS, 0), moved, made_of)


def _together(records: Sequence[PieceRecord]) -> str:
    return hashlib.sha256("".join(record["key"] for record in records).encode()).hexdigest()[:32]


def _files(job: Job, split: str, rows: int) -> Iterator[tuple[str, int, int]]:
    """Name, first row and end of each file of a split."""
    per_file = job.rows_per_group * job.groups_per_file
    for number, first in enumerate(range(0, rows, per_file)):
        yield f"{split}/part-{number:05d}.parquet", first, min(first + per_file, rows)


@dataclass(frozen=True)
class Written:
    """A file of rows that is there."""

    file: FileRecord
    scored: int
    """Labels that are learnt; for text all but the first of each row."""


def write_file(job: Job, plan: FilePlan) -> Written:
    """Write a file of rows, and then note that it is done."""
    storage = Storage(job.config.out)
    seq_len = job.config.seq_len
    scored = plan.rows * (seq_len - 1)

    def text() -> Iterator[Rows]:
        stream = Stream(plan.stretches)
        for first in range(0, plan.rows, job.rows_per_group):
            last = min(first + job.rows_per_group, plan.rows)
            ids = _read(storage, stream.cut(first * seq_len, last * seq_len))
            yield {"input_ids": np.concatenate(ids).reshape(-1, seq_len)}

    def chat() -> Iterator[Rows]:
        nonlocal scored
        scored = 0
        for first in range(0, plan.rows, job.rows_per_group):
            starts = plan.starts[first : first + job.rows_per_group + 1]
            ids = _read(storage, plan.stretches[starts[0] : starts[-1]])
            rows = [ids[a - starts[0] : b - starts[0]] for a, b in pairwise(starts)]
            columns = fill_rows(rows, seq_len, plan.pad)
            scored += int((columns["labels"] != UNSCORED).sum())
            yield columns

    groups = text() if job.config.kind == "text" else chat()
    file = write_rows(storage, plan.name, job.config.kind, seq_len, groups)
    written = Written(file, scored)
    storage.write(plan.record, json.dumps({"file": file, "scored": scored}).encode())
    return written


def read_written(storage: Storage, plan: FilePlan) -> Written:
    """What is noted of a file that is done."""
    note = json.loads(storage.read(plan.record))
    return Written(note["file"], int(note["scored"]))


def _read(storage: Storage, stretches: Sequence[Stretch]) -> list[Ids]:
    """The ids of stretches, in their order; neighbours in a file are read together."""
    found: dict[int, Ids] = {}
    order = sorted(range(len(stretches)), key=lambda i: (stretches[i].file, stretches[i].start))
    together: list[int] = []

    def load() -> None:
        first, last = stretches[together[0]], stretches[together[-1]]
        data = storage.read(first.file, first.start * 4, (last.start + last.count) * 4)
        ids: NDArray[np.int32] = np.frombuffer(data[: len(data) // 4 * 4], "<i4")
        if len(ids) != last.start + last.count - first.start:
            raise MachineError(f"{storage.url}: {first.file} is shorter than it was; empty OUT and begin anew")
        for index in together:
            begin = stretches[index].start - first.start
            found[index] = ids[begin : begin + stretches[index].count]

    for index in order:
        before = stretches[together[-1]] if together else None
        here = stretches[index]
        if before and (before.file != here.file or here.start - before.start - before.count > _GAP):
            load()
            together.clear()
        together.append(index)
    if together:
        load()
    return [found[index] for index in range(len(stretches))]
