"""Checkpoints of a run: what is trained, its optimizer state and the step, sharded, written while training goes on.

    OUT/training/checkpoints/step-00000500/    one file a worker and .metadata (PyTorch's distributed checkpoint),
                                               complete.json

Decides
- The state is a flat mapping of `model.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` for the trained parameters; frozen
  ones are in the base, and persistent buffers too. Without a base the buffers are `model.NAME` beside the parameters.
  Data, schedule and metrics follow from the step. Any number of workers reads what any other wrote.
- A checkpoint counts once `complete.json` is there, which is written when every worker's file and the metadata are; it
  carries the run's identity and the sizes of the files, so that one half written or of another run is never taken.
- Workers copy their shards to CPU memory (training waits for that) and a thread uploads them, one checkpoint at a time,
  with a process group of its own.
- The last `keep` are kept and the one with the least held-out loss; others go, oldest first, `complete.json` first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.sizes import size
from lesa_ray.training.state_files import StateReader, StateWriter

FOLDER = "training/checkpoints"
COMPLETE_FILE = "complete.json"
FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FOLDER_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Record:
    """What `complete.json` says of a checkpoint."""

    identity: str
    step: int
    """Optimizer steps done."""
    tokens: int
    heldout_loss: float | None
    names: list[str]
    """The trained parameters."""
    files: dict[str, int]
    """Sizes in bytes."""
    format: int = FORMAT


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def find_complete(out: str, identity: str | None = None) -> list[Record]:
    """The complete checkpoints of a run (of this identity), by step. Raises: MachineError."""
    storage = Storage(out).within(FOLDER)
    records = []
    for name in _folders(storage):
        record = _read(storage.within(name))
        if record is not None and identity in (None, record.identity) and name == folder_name(record.step):
            records.append(record)
    return sorted(records, key=lambda record: record.step)


def held_bytes(out: str) -> int:
    """Bytes of all a run's checkpoints, those that were left half written too."""
    storage = Storage(out).within(FOLDER)
    return sum(sum(storage.within(name).list().values()) for name in _folders(storage))


def _folders(storage: Storage) -> list[str]:
    """Names of the folders of checkpoints. Others, copies that somebody keeps among them, are not the run's."""
    return [name for name in storage.folders() if _FOLDER_NAME.fullmatch(name)]


def _read(storage: Storage) -> Record | None:
    """The record of a checkpoint folder; None if it is not whole."""
    try:
        content = json.loads(storage.read(COMPLETE_FILE))
    except (FileNotFoundError, ValueError):
        return None
    if content.get("format") != FORMAT:
        return None
    record = Record(**content)
    here = storage.list()
    whole = all(here.get(name) == nbytes for name, nbytes in record.files.items())
    return record if whole else None


def best_of(records: list[Record]) -> Record | None:
    """The one with the least held-out loss, the later of equal ones; None where none has one."""
    measured = [record for record in records if record.heldout_loss is not None]
    return min(measured, key=lambda record: (record.heldout_loss, -record.step), default=None)


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state before its first step, so that there is something to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in _MOMENTS},
            }


def state_of(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """The state that is saved and loaded, as the tensors themselves. buffers: those that no base holds."""
    held = {**trained, **(buffers or {})}
    state: dict[str, Any] = {f"model.{name}": tensor.detach() for name, tensor in held.items()}
    for name, parameter in trained.items():
        state |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    return state


def load(
    out: str,
    record: Record,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Fill parameters, buffers and optimizer from a checkpoint, each worker reading its part.

    Raises: UserError if it is one of other parameters; MachineError if it cannot be read."""
    if record.names != list(trained):
        raise UserError(f"{out}: its checkpoint holds other parameters than are to be trained now")
    storage = Storage(out).within(f"{FOLDER}/{folder_name(record.step)}")
    state = state_of(trained, optimizer, buffers)
    try:
        load_state(state, storage_reader=StateReader(storage), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise MachineError(f"{storage.url}: cannot be read ({_first_cause(error)})") from error
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["step"].fill_(record.step)


class Saver:
    """Writes checkpoints of a run in the background. All workers make one and call it at the same steps."""

    def __init__(
        self,
        out: str,
        identity: str,
        keep: int,
        group: dist.ProcessGroup,
        buffers: Mapping[str, torch.Tensor] | None = None,
        completed: int = 0,
    ) -> None:
        """group: of its own, on gloo: what the thread that uploads says to the others must not mix with training's.
        buffers: those that no base holds. completed: step of the last checkpoint that is there."""
        self._buffers = buffers
        self._out, self._identity, self._keep, self._group = out, identity, keep, group
        self.completed = completed
        self._under_way: tuple[Any, int, int, float | None, list[str]] | None = None

    def save(
        self,
        step: int,
        tokens: int,
        heldout_loss: float | None,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Begin to save; returns once the state is copied. Waits for the last one first.

        Raises: MachineError if the last one could not be written."""
        self.wait()
        storage = Storage(self._out).within(f"{FOLDER}/{folder_name(step)}")
        if dist.get_rank() == 0:
            _remove(storage)  # what an earlier try left, maybe of another number of workers
        dist.barrier(self._group)
        future = async_save(
            state_of(trained, optimizer, self._buffers), storage_writer=StateWriter(storage), process_group=self._group
        )
        self._under_way = (future, step, tokens, heldout_loss, list(trained))

    def poll(self) -> bool:
        """Complete the checkpoint under way if its files are there, and whether that is so now. A collective: the same
        on all workers."""
        if self._under_way is None:
            return False
        done = torch.tensor([int(self._under_way[0].done())])
        dist.all_reduce(done, dist.ReduceOp.MIN)  # the group is the thread's: messages would mix
        if not done.item():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait for the checkpoint under way, complete it, and remove what is not kept. Raises: MachineError."""
        if self._under_way is None:
            return
        future, step, tokens, heldout_loss, names = self._under_way
        self._under_way = None
        storage = Storage(self._out).within(f"{FOLDER}/{folder_name(step)}")
        try:
            future.result()
            if dist.get_rank() == 0:
                record = Record(self._identity, step, tokens, heldout_loss, names, storage.list())
                storage.write(COMPLETE_FILE, (json.dumps(asdict(record)) + "\n").encode())
        except (CheckpointException, OSError) as error:
            free = storage.free_bytes()  # of a full disk PyTorch's writer only says that a position is unexpected
            room = "" if free is None else f"; the disk has {size(free)} free"
            raise MachineError(f"{storage.url}: cannot be written ({_first_cause(error)}){room}") from error
        self.completed = step
        if dist.get_rank() == 0:
            prune(self._out, self._identity, self._keep)


def prune(out: str, identity: str, keep: int) -> None:
    """Remove checkpoints of this run beyond the last `keep` and the best, and those that were left half written."""
    storage = Storage(out).within(FOLDER)
    records = find_complete(out, identity)
    kept = {record.step for record in records[-keep:]}
    if (best := best_of(records)) is not None:
        kept.add(best.step)
    names = {folder_name(step) for step in kept}
    for name in _folders(storage):
        if name not in names and name <= folder_name(records[-1].step if records else -1):
            _remove(storage.within(name))


def _remove(storage: Storage) -> None:
    """Remove a checkpoint, such that it never counts with some of its files gone."""
    storage.remove(COMPLETE_FILE)
    storage.remove_tree()


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        return explain(wrapped[0])
    return explain(error)
