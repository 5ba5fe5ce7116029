"""`lesa_ray.distributed.analyze.analyze`: one checkpoint's weights and, with data, what its layers add to the stream.

    headers, data ▸ a piece of work for each weight type, each block, the forward pass ▸ analysis.json

In this process, one piece after another with all its cores and its GPU, where no Ray is named (`address.named_ray`):
starting one takes longer than small models do. Else each piece is a Ray task with a GPU of its own, where there are
some, the largest first. With `out` each finished piece is kept there until all are, so the same command goes on after a
fault.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lesa_ray.analysis.document import make_report
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import Subject, open_subject, work_on_block, work_on_type
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.distributed.address import named_ray
from lesa_ray.distributed.report_file import try_place, write_report
from lesa_ray.distributed.shared import Landmark, check_landmarks, landmarks
from lesa_ray.errors import KeptError, MachineError, RoomError, UserError
from lesa_ray.expansion.out import check_out
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import explain, is_fault, taken_up_again
from lesa_ray.gpu import full_gpu_is_a_fault, keep_float32
from lesa_ray.places import shown
from lesa_ray.report.page.commands import command
from lesa_ray.report.page.packages import missing_package

if TYPE_CHECKING:
    from lesa_ray.distributed.cluster import Share
    from lesa_ray.evaluation.checkpoints import Bounds
    from lesa_ray.evaluation.measure import Job as Forward

log = logging.getLogger(__name__)

FILE, PAGE_FILE = "analysis.json", "analysis.html"
_RESIDUAL = "residual stream"
_SHELF = "analysis-"
_KEPT = 3
"""Changes with what is kept of a finished piece, so that an older version's is not taken up."""
_INTERPRETER_BYTES = 2 * 2**30  # a worker with torch and transformers

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Work:
    """All pieces: weight types and blocks by name, and the forward pass where there are data for it."""

    subject: Subject
    residual: tuple[Forward, Bounds] | None

    @property
    def pieces(self) -> list[str]:
        """The largest first."""
        types = sorted(self.subject.types, key=self.subject.nbytes, reverse=True)
        return [*([_RESIDUAL] if self.residual is not None else []), *self.subject.blocks, *types]

    def do(self, piece: str, device: str, progress: Progress = lambda phase, share: None) -> Any:
        keep_float32()
        if piece != _RESIDUAL:
            try:
                with full_gpu_is_a_fault(piece, "--device cpu"):
                    work = work_on_type if piece in self.subject.types else work_on_block
                    return work(self.subject, piece, device, progress)
            except RoomError:
                raise
            except UserError as error:
                raise _WrongWeights(str(error)) from error
        from lesa_ray.analysis.residual import measure_residual

        assert self.residual is not None
        job, bounds = self.residual
        job = replace(job, config=job.config.model_copy(update={"device": device}))
        return measure_residual(job, bounds, self.subject.config.tokens, progress)


class _WrongWeights(UserError):
    """The checkpoint itself is not as it should be, so what is finished is of no use."""


class _Shelf:
    """Where finished types wait for the others: a folder below OUT, or nowhere. It is found again by all that they
    depend on, so the same command with other data, window or GPUs takes them up. The forward pass is quick, and what it
    read may have changed."""

    def __init__(self, storage: Storage | None, subject: Subject) -> None:
        self._storage, self._folder = storage, ""
        if storage is not None:
            counted = subject.config.model_dump(mode="json", include={"seed", "lesa", "memory_budget"})
            identity = [_KEPT, counted, bool(subject.fitted), subject.new_layers, subject.checkpoint.digests()]
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            self._folder = f"{WORK_DIR}/{_SHELF}{digest[:16]}"

    def get(self, piece: str) -> Any:
        """What was kept, or None."""
        if self._storage is None or piece == _RESIDUAL or not self._storage.exists(self._name(piece)):
            return None
        return json.loads(self._storage.read(self._name(piece)))

    def put(self, piece: str, result: Any) -> None:
        if self._storage is not None and piece != _RESIDUAL:
            with taken_up_again(f"--out {shown(self._storage.url)}"):
                self._storage.write(self._name(piece), json.dumps(result, allow_nan=False).encode())

    def clear(self) -> None:
        """Remove it and those of other settings, and what is empty then."""
        if self._storage is None:
            return
        work = self._storage.within(WORK_DIR)
        for name in work.folders():
            if name.startswith(_SHELF):
                work.remove_tree(name)
        work.remove_if_empty()
        self._storage.remove_if_empty()

    def _name(self, piece: str) -> str:
        plain = re.sub(r"[^\w.-]", "_", piece)
        return f"{self._folder}/{plain}.json"


def analyze(config: AnalyzeConfig, listener: Listener | None = None, *, use_ray: bool | None = None) -> dict[str, Any]:
    """Look at a checkpoint; the content of analysis.json, which `config.out` gets too.

    use_ray: None decides by whether a Ray is named. Raises: UserError for wrong input, with nothing left behind;
    KeptError for what is wrong beside the weights, found when some of these were finished (with `out`, which keeps
    them); MachineError for a fault, after which the same call goes on (with `out`); NotWritten if `out` does not take
    the finished report."""
    listener = listener or Silent()
    listener.phase("reading the headers", 0)
    subject = open_subject(config)
    storage = None
    if config.out is not None:
        check_out(config.base, config.out)
        storage = try_place(config.out, config.out)
    residual = None
    if config.data:
        from lesa_ray.analysis.residual import prepare_residual

        residual = prepare_residual(config)
    work, shelf = _Work(subject, residual), _Shelf(storage, subject)
    done = {piece: result for piece in work.pieces if (result := shelf.get(piece)) is not None}
    missing = [piece for piece in work.pieces if piece not in done]
    if use_ray is None:
        use_ray = named_ray() is not None

    def finished(piece: str, result: Any) -> None:
        done[piece] = result
        shelf.put(piece, result)

    try:
        if missing:
            (_side_by_side if use_ray else _in_turn)(work, missing, finished, listener)
        report = make_report(subject, done, done.get(_RESIDUAL))
        if storage is not None:
            write_report(report, storage, FILE)
            if config.page:
                _write_page(report, config, storage, listener)
        shelf.clear()
    except UserError as error:  # wrong data, or a GPU that is not there, says nothing against finished weights
        if storage is not None and done and not isinstance(error, _WrongWeights):
            raise KeptError(str(error)) from error
        shelf.clear()
        raise
    except MachineError:
        raise
    except Exception as error:
        if is_fault(error):
            raise MachineError(f"BASE {config.base}: {explain(error)[:300]}") from error
        raise
    return report


def _write_page(report: dict[str, Any], config: AnalyzeConfig, storage: Storage, listener: Listener) -> None:
    """Write the page, or say why there is none."""
    if missing := missing_package():
        log.warning("%s/%s is left out: %s", shown(storage.url), PAGE_FILE, missing)
        return
    from lesa_ray.report.page.build import analysis_page

    listener.phase("drawing the page", 0)
    page = analysis_page(report, _command(config)).encode()
    with taken_up_again(f"--out {shown(storage.url)}"):
        storage.write(PAGE_FILE, page)


def _command(config: AnalyzeConfig) -> str:
    """What makes the same again."""
    settings = config.model_dump(mode="json")
    return command(["lesa-ray", "analyze", config.base], AnalyzeConfig, settings, {"base", "lesa"})


def _in_turn(work: _Work, pieces: list[str], finished: Callable[[str, Any], None], listener: Listener) -> None:
    """One piece after another in this process."""
    import torch

    wanted = work.subject.config.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    listener.phase(_title(work), len(pieces))
    for place, piece in enumerate(pieces):

        def progress(phase: str, share: float, piece: str = piece, place: int = place) -> None:
            listener.progress(place + share, f"{piece}: {phase}")

        finished(piece, work.do(piece, device, progress))


def _side_by_side(work: _Work, pieces: list[str], finished: Callable[[str, Any], None], listener: Listener) -> None:
    """A Ray task for each piece; the first to fail stops the others."""
    import ray

    from lesa_ray.distributed.board import on_board, open_board
    from lesa_ray.distributed.cluster import share_of_task
    from lesa_ray.distributed.start import start_ray
    from lesa_ray.distributed.tasks import Tasks

    listener.phase("starting Ray", 0)
    start_ray()
    config = work.subject.config

    def share_of(gpus: float | None) -> Share:
        return share_of_task(
            "a piece",
            len(pieces),
            device=config.device,
            gpus=gpus,
            cpus=config.cpus_per_task,
            tell=lambda text: listener.phase(text, 0),
        )

    wanted = config.gpus_per_task
    one = share_of(wanted if wanted is None else min(wanted, 1))
    shares = dict.fromkeys(pieces, one)
    if _RESIDUAL in shares and wanted is not None and wanted > 1:
        shares[_RESIDUAL] = share_of(wanted)  # its model is spread over them
    listener.phase(_title(work), len(pieces))
    subject = work.subject
    shared, folders = ray.put(work), landmarks([(f"BASE {config.base}", subject.checkpoint.storage, "config.json")])
    with open_board() as board, Tasks[str](_task) as tasks:
        for piece in pieces:
            share = shares[piece]
            resources = share.options(_memory(work, piece))
            tasks.start(piece, f"analyze {piece}", *(shared, piece, share, board, folders), **resources)
        while tasks:
            for piece, result in tasks.ended():
                finished(piece, result)
            state = on_board(board) or {}
            begun = {piece: state[piece] for piece in tasks if piece in state}
            reached = len(pieces) - len(tasks) + sum(share for _, share in begun.values())
            under_way = [f"{piece}: {phase}" for piece, (phase, _) in begun.items()]
            listener.progress(reached, tasks.told(", ".join(under_way[:2])))


def _task(work: _Work, piece: str, share: Share, board: Any, folders: tuple[Landmark, ...]) -> Any:
    from lesa_ray.distributed.board import posting

    check_landmarks(folders)
    return work.do(piece, share.begin(), posting(board, piece))


def _memory(work: _Work, piece: str) -> int:
    """Rough bytes of host memory of a task."""
    if piece == _RESIDUAL:
        return work.subject.checkpoint.nbytes + _INTERPRETER_BYTES
    return work.subject.memory(piece) + _INTERPRETER_BYTES


def _title(work: _Work) -> str:
    return f"looking at {work.subject.config.base}"
