"""`lesa_ray.distributed.tokenize`: data → token blocks, by Ray Data.

    find the data ▸ deal out pieces ▸ tokenise them (Ray Data) ▸ lay out rows ▸ write their files (Ray Data) ▸ manifest

Decides
- Ray Data schedules, balances and repeats the work; a row of its data sets is a piece of work, or the record of one.
  Ids go to storage, so neither the driver nor Ray's object store holds more than records. Which work there is and what
  comes of it does not depend on Ray: the same data and settings give the same bytes on any cluster.
- While the work is under way, OUT holds `.lesa-ray/` and no manifest, so nothing can take it for token blocks. The same
  command goes on with the pieces and files that are done. The manifest is written last.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import RayError

from lesa_ray.checkpoint.mark import LEASE_DIR, MARK_FILE
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.distributed.address import check_address
from lesa_ray.distributed.cluster import Tell, telling_of_waits
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.other_code import other_code
from lesa_ray.distributed.shared import Landmark, check_landmarks, data_files, landmarks
from lesa_ray.distributed.start import start_ray
from lesa_ray.distributed.tenancy import Tenant, remove_if_mine, tenancy
from lesa_ray.errors import KeptError, MachineError, UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import explain, going_on, is_fault, reaching
from lesa_ray.training import layout, pieces, sources, tokens
from lesa_ray.training.block_folder import BEGUN, STOP, Run, abandon, claim, finish, finished_pieces, out_state, prepare
from lesa_ray.training.data_settings import TokenizeConfig
from lesa_ray.training.layout import Layout, Written
from lesa_ray.training.pieces import Job, PieceRecord
from lesa_ray.training.sources import Part, Piece
from lesa_ray.training.tokenizer import files_digest
from lesa_ray.training.tokens import TokenBlocks, open_blocks

_TRIES = 3

Work = TypeVar("Work")


@dataclass(frozen=True)
class Tokenized:
    """What came of it."""

    blocks: TokenBlocks
    seconds: float
    reused: bool
    """OUT was complete already."""
    resumed: bool
    """An interrupted run was taken up."""


def tokenize(config: TokenizeConfig, listener: Listener | None = None, *, tenant: Tenant | None = None) -> Tokenized:
    """Make token blocks of text or conversations.

    tenant: who may work at OUT, if the caller has seen to it; by default this call does.
    Raises: UserError for wrong input, with nothing left behind; KeptError for rows that are wrong, found when others
    were done: those stay; MachineError for a fault. After both the same call goes on."""
    listener = listener or Silent()
    begin = time.monotonic()
    check_address()
    listener.phase("looking at the data", 0)
    storage = Storage(config.out)
    config = config.model_copy(update={"out": storage.url})  # tasks run in folders of their own
    run = prepare(config)
    with reaching(f"OUT {config.out}", "cannot be written"):
        state = out_state(storage, run)
    if state == "done":
        return _reused(storage, begin)
    with tenancy(config.out, LEASE_DIR, listener, tenant) as tenant:
        return _work(config, run, listener, tenant, begin)


def _work(config: TokenizeConfig, run: Run, listener: Listener, tenant: Tenant, begin: float) -> Tokenized:
    """The token blocks, at an OUT where nobody else works."""
    storage = Storage(config.out)
    with reaching(f"OUT {config.out}", "cannot be written"):
        state = out_state(storage, run)  # as whoever was at work there until now left it
    if state == "done":
        return _reused(storage, begin)
    job = Job(config, files_digest(run.tokenizer), tokens.rows_per_group(config.seq_len), layout.GROUPS_PER_FILE)
    with reaching(f"OUT {config.out}", "cannot be written"):
        claim(storage, run)
    try:
        with _keeping(storage):
            dealt = _limited(job, sources.deal(run.sources, sources.PIECE_BYTES))
            listener.phase("starting Ray", 0)
            start_ray()
            folders = _folders(job, run)
            records = _tokenise(job, dealt, folders, listener)
        if not sum(record["counts"]["documents"] for record in records):
            raise _no_documents(config, records)
        plan = (
            layout.plan_text(job, records)
            if config.kind == "text"
            else layout.plan_chat(job, records, run.pad(records))
        )
        written = _write(job, plan, folders, listener)
        finish(storage, run, job, dealt, records, plan, written)
    except KeptError:
        raise
    except UserError:
        remove_if_mine(tenant, partial(abandon, storage))
        raise
    except Exception as error:
        if is_fault(error):
            raise going_on(f"OUT {config.out}", error) from error
        raise
    return Tokenized(open_blocks(config.out), time.monotonic() - begin, reused=False, resumed=state == "resume")


def _reused(storage: Storage, begin: float) -> Tokenized:
    """What a run that was finished before gives."""
    storage.remove_tree(WORK_DIR)
    return Tokenized(open_blocks(storage.url), time.monotonic() - begin, reused=True, resumed=False)


@contextmanager
def _keeping(storage: Storage) -> Iterator[None]:
    """What is found wrong with the data while pieces of it are done does not cost those. Raises: KeptError."""
    try:
        yield
    except UserError as error:
        if not (done := finished_pieces(storage)):
            raise
        raise KeptError(
            f"{error}; what is finished stays (pieces of the data: {done:,}), and the same command goes on from there"
        ) from error


def _folders(job: Job, run: Run) -> tuple[Landmark, ...]:
    """What a task has to find where it runs."""
    out = job.config.out
    return landmarks([*data_files(run.sources), (f"OUT {out}", Storage(out), MARK_FILE)])


def _no_documents(config: TokenizeConfig, records: Sequence[PieceRecord]) -> UserError:
    where = f"DATA {' '.join(config.data)}"
    if bad := sum(record["counts"]["bad_rows"] for record in records):
        first = next(record["bad"][0] for record in records if record["bad"])
        return UserError(f"{where}: each of its {bad:,} rows is wrong; the first: {first}")
    return UserError(f"{where}: is empty; there is not one document in it")


def _limited(job: Job, dealt: list[Piece]) -> list[Piece]:
    """The pieces as far as the limit of documents goes. They are counted here: a limit is for a trial."""
    left = job.config.limit
    if left is None:
        return dealt
    kept = []
    last: Part | None = None
    for piece in dealt:
        parts: list[Part] = []
        for part in piece.parts:
            rest = last is not None and part.source == last.source and part.source.kind == "plain"
            if left or rest:  # the last document may lie in several parts
                last = part
                count = pieces.count_documents(part, job, left)
                parts.append(Part(part.source, part.index, part.count, take=left))
                left -= count
        if parts:
            kept.append(Piece(tuple(parts)))
    return kept


def _tokenise(job: Job, dealt: list[Piece], folders: tuple[Landmark, ...], listener: Listener) -> list[PieceRecord]:
    """The records of all pieces, in their order; pieces with a record are done, but those that were made without rows
    that are wrong where such rows are to stop it now."""
    storage = Storage(job.config.out)
    there = Storage(f"{storage.url}/{pieces.PIECES}").list()
    done = [piece for piece in dealt if pieces.piece_record(piece.key).rsplit("/", 1)[-1] in there]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda piece: json.loads(storage.read(pieces.piece_record(piece.key))), done)
        skips = job.config.bad_rows == "skip"
        records: dict[str, PieceRecord] = {r["key"]: r for r in found if skips or not r["counts"]["bad_rows"]}
    left = [piece for piece in dealt if piece.key not in records]
    listener.phase("tokenising", sum(piece.nbytes for piece in dealt))
    nbytes = sum(piece.nbytes for piece in dealt if piece.key in records)
    count = sum(sum(record["tokens"].values()) for record in records.values())
    bad = sum(record["counts"]["bad_rows"] for record in records.values())
    health = Health(storage.url, "tokenize")
    results = _run_all(job, pieces.tokenise_piece, left, folders, lambda text: listener.progress(nbytes, text))
    for piece, record in zip(left, results, strict=True):
        records[piece.key] = record
        nbytes += piece.nbytes
        count += sum(record["tokens"].values())
        bad += record["counts"]["bad_rows"]
        health.task_ended(piece.nbytes)
        listener.progress(nbytes, f"{count:,} tokens" + (f", {bad:,} rows left out" if bad else ""))
    return [records[piece.key] for piece in dealt]


def _write(job: Job, plan: Layout, folders: tuple[Landmark, ...], listener: Listener) -> list[Written]:
    """All files of rows, in their order; those that are noted as done are not written again."""
    storage = Storage(job.config.out)
    names = {file.name for file in plan.files}
    for name in (f"{split}/{name}" for split in tokens.SPLITS for name in storage.within(split).list()):
        if name not in names:  # of more data than there are now
            storage.remove(name)
    noted = storage.within(layout.FILES)
    for name in noted.folders():
        if name != plan.made_of:  # of other data, whose files are written over now
            noted.remove_tree(name)
    there = noted.within(plan.made_of).list()
    done = [file for file in plan.files if file.record.rsplit("/", 1)[-1] in there]
    with ThreadPoolExecutor(16) as pool:
        notes = pool.map(partial(layout.read_written, storage), done)
        written = {file.name: note for file, note in zip(done, notes, strict=True)}
    left = [file for file in plan.files if file.name not in written]
    listener.phase("writing rows", sum(file.rows for file in plan.files))
    rows = sum(file.rows for file in done)
    health = Health(storage.url, "tokenize")
    results = _run_all(job, layout.write_file, left, folders, lambda text: listener.progress(rows, text))
    for file, note in zip(left, results, strict=True):
        written[file.name] = note
        rows += file.rows
        health.task_ended()
        listener.progress(rows, file.name)
    return [written[file.name] for file in plan.files]


def _run_all(
    job: Job, work: Callable[[Job, Work], Any], items: Sequence[Work], folders: tuple[Landmark, ...], tell: Tell
) -> Iterator[Any]:
    """`work(job, item)` of each item, as Ray Data tasks, in the order of the items.

    tell: is told if no machine is left, or others have those that are.
    Raises: UserError when all tasks that had begun have ended, so that nothing is written any more; MachineError."""
    if not items:
        return
    storage = Storage(job.config.out)
    storage.remove(BEGUN)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(_do, fn_args=(work, job, folders), num_cpus=1)
        dataset.context.execution_options.preserve_order = True
        wrong: UserError | None = None
        with telling_of_waits({"CPU": 1.0}, tell, lambda: storage.exists(BEGUN)):
            for row in dataset.iter_rows():
                kind, result = pickle.loads(row["result"])
                if kind == "machine":
                    raise MachineError(result)
                if kind == "user" and wrong is None:
                    wrong = UserError(result)
                    storage.write(STOP, b"")  # where the task itself did not find OUT
                elif kind == "done" and wrong is None:
                    yield result
        if wrong:
            raise wrong
    except RayError as error:
        cause = getattr(error, "cause", None)
        if cause is not None and not isinstance(cause, RayError):
            raise cause from error
        if lack := other_code(error, f"OUT {job.config.out}"):
            raise lack from error
        raise MachineError(f"a task was lost for good ({explain(error)[:200]})") from error
    finally:
        context.enable_progress_bars = before


def _do(
    row: dict[str, Any], work: Callable[[Job, Any], Any], job: Job, folders: tuple[Landmark, ...]
) -> dict[str, bytes]:
    """One piece of work in a Ray worker. What the user did wrong and faults of the machine come back as words."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task is given one CPU
    try:
        check_landmarks(folders)
    except UserError as error:
        return {"result": pickle.dumps(("user", str(error)))}
    storage = Storage(job.config.out)
    item = pickle.loads(row["item"])
    for attempt in range(1, _TRIES + 1):
        try:
            if storage.exists(STOP):
                return {"result": pickle.dumps(("skipped", ""))}
            if not storage.exists(BEGUN):
                storage.write(BEGUN, b"")
            return {"result": pickle.dumps(("done", work(job, item)))}
        except UserError as error:
            storage.write(STOP, b"")
            return {"result": pickle.dumps(("user", str(error)))}
        except Exception as error:
            if not is_fault(error):
                raise
            if attempt == _TRIES:
                return {"result": pickle.dumps(("machine", explain(error)))}
            time.sleep(2**attempt)
    raise AssertionError("unreachable")
