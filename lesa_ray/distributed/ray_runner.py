"""Units and shards as Ray tasks.

Each unit is a task with its own CPUs, GPU and memory; the largest starts first, one starts as soon as those it reads
from are done. A task leaves its tensors in storage and returns a record of a few hundred bytes, so nothing large
travels. When a worker dies Ray starts the task again, on the same or another machine: a unit's file appears only when
it is whole, and the same seed gives the same bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from lesa_ray.checkpoint.mark import MARK_FILE
from lesa_ray.checkpoint.shards import Shard
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import write_shard
from lesa_ray.distributed.board import on_board, open_board, posting
from lesa_ray.distributed.cluster import Share, share_of_task
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.shared import Landmark, check_landmarks, landmarks
from lesa_ray.distributed.start import start_ray
from lesa_ray.distributed.tasks import Tasks
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.memory import INTERPRETER_BYTES
from lesa_ray.expansion.method import Unit
from lesa_ray.expansion.runner import Listener, own_peak_memory, weight_of
from lesa_ray.expansion.workbench import run_unit
from lesa_ray.faults import explain


def _unit_task(
    expansion: Expansion, unit: Unit, share: Share, board: Any, folders: tuple[Landmark, ...]
) -> tuple[dict[str, Any], int]:
    check_landmarks(folders)
    post = posting(board, unit.name)
    device = share.begin()
    record = run_unit(
        expansion.job,
        unit,
        expansion.made_in,
        expansion.checkpoints,
        expansion.job.config.out,
        device=device,
        threads=share.cpus,
        progress=post,
    )
    return record, own_peak_memory()


def _for_any_folder(expansion: Expansion) -> Expansion:
    """The same, whatever folder it is written to from: that of a worker need not be this process's."""
    config = expansion.job.config
    placed = config.model_copy(update={"out": Storage(config.out).url})
    return replace(expansion, job=replace(expansion.job, config=placed))


def _folders(expansion: Expansion) -> tuple[Landmark, ...]:
    """What a task has to find where it runs."""
    config = expansion.job.config
    read = [
        (f"checkpoint {checkpoint.base}", checkpoint.storage, "config.json") for checkpoint in expansion.checkpoints
    ]
    return landmarks([*read, (f"OUT {config.out}", Storage(config.out), MARK_FILE)])


def _shard_task(out: str, shard: Shard, board: Any, folders: tuple[Landmark, ...]) -> int:
    check_landmarks(folders)
    posting(board, shard.file)
    write_shard(Storage(out), shard)
    return own_peak_memory()


class RayRunner:
    """Runs the work of an expansion on Ray."""

    def __init__(self) -> None:
        start_ray()
        self._peak = own_peak_memory()

    def run_units(self, expansion: Expansion, units: list[Unit], listener: Listener) -> dict[str, Any]:
        config = expansion.job.config
        memory = {unit.name: unit.memory + INTERPRETER_BYTES for unit in units}
        share = share_of_task(
            "a unit",
            len(units),
            gpus=config.gpus_per_task,
            cpus=config.cpus_per_task,
            # A budget that was stated is what a unit will hold; by default it holds what there is where it runs.
            memory=max(memory.values()) if config.memory_budget else 0,
            tell=lambda text: listener.progress(0.0, text),
        )
        shared, folders = ray.put(_for_any_folder(expansion)), _folders(expansion)
        health = Health(Storage(config.out).url, "expand")
        waiting = sorted(units, key=lambda unit: -unit.flops)
        here = {unit.name for unit in units}
        records: dict[str, Any] = {}
        with open_board() as board, Tasks[str](_unit_task, begun=lambda: on_board(board)) as tasks:
            while waiting or tasks:
                ready = [u for u in waiting if all(n in records or n not in here for n in u.after)]
                for unit in ready if tasks.fault is None else []:
                    waiting.remove(unit)
                    tasks.start(
                        unit.name,
                        f"unit {unit.name}",
                        *(shared, unit, share, board, folders),
                        **share.options(memory[unit.name]),
                    )
                fault = tasks.fault
                for name, (record, peak) in tasks.ended():
                    records[name] = record
                    self._peak = max(self._peak, peak)
                    health.task_ended()
                if tasks.fault is not None and fault is None:
                    text = f"a unit met a fault ({explain(tasks.fault)}); waiting for those that have begun"
                    listener.phase(text, sum(map(weight_of, units)))
                self._tell(listener, units, records, board, tasks)
        return records

    def _tell(
        self, listener: Listener, units: list[Unit], records: dict[str, Any], board: Any, tasks: Tasks[str]
    ) -> None:
        state = on_board(board)
        if state is None:
            return
        shares = {unit.name: 1.0 if unit.name in records else state.get(unit.name, ("", 0.0))[1] for unit in units}
        under_way = [f"{u.name}: {state[u.name][0]}" for u in units if u.name in state and u.name not in records]
        done = sum(weight_of(unit) * shares[unit.name] for unit in units)
        listener.progress(done, tasks.told(", ".join(under_way[:2])))

    def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
        out = Storage(expansion.job.config.out).url
        health = Health(out, "expand")
        sizes = {shard.file: shard.nbytes for shard in shards}
        written, folders = 0, _folders(expansion)
        with open_board() as board, Tasks[str](_shard_task) as tasks:
            for shard in shards:
                tasks.start(shard.file, shard.file, out, shard, board, folders, num_cpus=1)
            while tasks:
                for file, peak in tasks.ended():
                    self._peak = max(self._peak, peak)
                    written += sizes[file]
                    health.task_ended(sizes[file])
                begun = on_board(board) or {}
                listener.progress(written, tasks.told(", ".join([file for file in tasks if file in begun][:2])))

    def peak_memory(self) -> int:
        return max(self._peak, own_peak_memory())
