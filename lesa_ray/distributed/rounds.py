"""The rounds of a training run: Ray Train runs the workers until they are done, or until a fault, and then again.

A round has a fixed number of workers. What decides about the next is here:

- After a fault (a worker, a machine, the store) there is another round from the last complete checkpoint, `retries`
  times at most without a new checkpoint in between; after the first fault at once, then after longer and longer pauses,
  as a store may be away for minutes.
- Machines that are lost are waited for and asked for, as at the start; machines that others use are waited for as long
  as it takes. Both are said.
- With a range of workers each round takes as many as are free. One that could be larger ends when it has just completed
  a checkpoint: of growing, only the steps that were done while that was written are made twice.
- A worker that finds the input wrong (a loss that is no number, say) leaves the reason on a board that outlives it:
  nothing is tried again.

Ray Train is told of no checkpoints: workers find the last complete one themselves. Its own storage is a filesystem in
memory: nothing it would keep there is needed, and a store that fails has one way less to stop the run.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.cluster import OTHERS_HAVE_IT, check_here, free, machines, on_this_machine
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.orphans import give_back_room
from lesa_ray.distributed.other_code import other_code
from lesa_ray.distributed.room_for_workers import GOES_ON, Resources, wait_for_room, workers_now
from lesa_ray.distributed.shared import Landmark, landmarks
from lesa_ray.distributed.tasks import POLL_SECONDS
from lesa_ray.distributed.train_worker import Board, work
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Listener
from lesa_ray.faults import explain
from lesa_ray.machines import told
from lesa_ray.training.loop import Progress
from lesa_ray.training.run import RUN_FILE, Run
from lesa_ray.training.tokens import MANIFEST

_TIMEOUT_SECONDS = 1800
_FREED_SECONDS = 30.0
"""How long Ray may take to free what the workers of a round had."""
_ABORT_SECONDS = 20.0
_PAUSE_SECONDS = 15.0
"""Between a second fault without a checkpoint and the next round; four times as long after each more, up to"""
_LONGEST_PAUSE = 300.0


class Faults:
    """Counts faults from one checkpoint to the next."""

    def __init__(self, retries: int) -> None:
        self._retries, self._count, self._saved = retries, 0, 0

    def pause(self, saved: int) -> float | None:
        """Seconds to wait before another round after a fault; None if there were too many.

        saved: step of the last complete checkpoint."""
        if saved > self._saved:
            self._saved, self._count = saved, 0
        self._count += 1
        if self._count > self._retries:
            return None
        return 0.0 if self._count == 1 else min(_PAUSE_SECONDS * 4.0 ** (self._count - 2), _LONGEST_PAUSE)

    def __str__(self) -> str:
        return f"{self._count} of {self._retries} since the last checkpoint"


class Watch:
    """Shows a run's progress and, when a checkpoint has just been completed, ends a round that could be larger."""

    def __init__(self, board: Any, run: Run, listener: Listener) -> None:
        self._board, self._steps, self._listener = board, run.steps, listener
        self._health = Health(Storage(run.config.out).url, "train")
        self._last: Progress | None = None
        self._stop, self._thread = threading.Event(), threading.Thread()
        self.controllers: list[Any] = []
        """Ray Train's actor, with which a round's workers go."""
        self.grows = False
        """Whether this round was ended for a larger one."""

    @property
    def saved(self) -> int:
        """Step of the last complete checkpoint, as far as it was told."""
        return 0 if self._last is None else self._last.saved

    def begin(self, more: Mapping[str, float] | None) -> None:
        """A round begins. more: what another worker would take; None where there are to be no more."""
        self.grows, self._stop = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop, more), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The round has ended, or is to end now."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        self._stop_workers()

    def _stop_workers(self) -> None:
        """Let Ray Train stop its workers and give back what they had, which nobody else does for it where Ray has no
        dashboard."""
        while self.controllers:
            controller = self.controllers.pop()
            with contextlib.suppress(RayError):  # its end is no answer
                ray.get(controller.abort.remote(), timeout=_ABORT_SECONDS)
            ray.kill(controller)

    def _told(self) -> Progress | None:
        """What is on the board; what was there before if that does not answer, as the run does not depend on it."""
        with contextlib.suppress(RayError):
            values: dict[str, Any] | None = ray.get(self._board.get.remote(), timeout=30)
            return None if values is None else Progress(**values)
        return self._last

    def _watch(self, stop: threading.Event, more: Mapping[str, float] | None) -> None:
        self._last = self._told()  # by the last round
        shown, saved = False, self.saved
        while not stop.wait(POLL_SECONDS):
            progress = self._told()
            if progress is None or progress == self._last:
                continue
            if not shown:
                self._listener.phase("training", self._steps)
                shown = True
            self._last = progress
            self._listener.progress(progress.step, line(progress))
            self._health.trained(progress)
            if progress.saved > saved:
                saved = progress.saved
                if more is not None and free().room(more):
                    self.grows = True
                    self._stop_workers()
                    return


def train_in_rounds(run: Run, resources: Resources, listener: Listener) -> None:
    """Let Ray Train run the workers until the last step is done. Raises: UserError, MachineError."""
    place = on_this_machine()
    board = ray.remote(num_cpus=0, max_concurrency=4, scheduling_strategy=place)(Board).remote()
    faults, seconds = Faults(run.config.retries), 0.0
    watch = Watch(board, run, listener)
    try:
        while True:
            give_back_room()  # of a round before, or of a run that was led from a machine that is lost
            workers = workers_now(resources, seconds)
            listener.phase(f"starting {workers} worker{'s' if workers > 1 else ''}", 0)
            watch.begin(resources.per_worker if workers < resources.most else None)
            error = _round(run, resources, workers, board, watch)
            watch.end()
            if error is not None:
                check_here(GOES_ON)
            _raise_failure(board)
            if error is None:
                return
            if lack := other_code(error, f"OUT {run.config.out}"):
                raise lack from error
            seconds = _FREED_SECONDS
            if watch.grows:
                listener.phase(f"step {watch.saved:,} is saved, and there is room for more than {workers} workers", 0)
                continue
            if _is_no_room(error):
                each, seconds = told(resources.per_worker), 0.0
                listener.phase(f"waiting for room for {workers} × {each}: {OTHERS_HAVE_IT}", 0)
            else:
                cause, pause = _cause(error), faults.pause(watch.saved)
                if pause is None:
                    raise MachineError(f"training stopped: {cause}; {GOES_ON}") from error
                listener.phase(f"fault {faults}: {cause}; again{f' in {pause:g} s' if pause else ''}", 0)
                time.sleep(pause)
            # As until now: machines with GPUs that are lost are waited for, and not replaced by others without.
            as_before = run.config.model_copy(update={"gpus_per_worker": resources.gpus})
            resources = wait_for_room(as_before, listener, again=True)
    finally:
        watch.end()
        ray.kill(board)


def _round(run: Run, resources: Resources, workers: int, board: Any, watch: Watch) -> Exception | None:
    """Start workers and wait for their end. Returns what ended them before the last step was done."""
    trainer = _trainer(run, resources, workers, board)
    # Ray's own would take Ctrl-C for the rest of the process, and end it with exit code 0. It knows the actor that the
    # workers go with, without which they would train on when this call has been interrupted.
    trainer._register_sigint_handler = watch.controllers.append
    try:
        trainer.fit()
    except Exception as error:
        return error
    return None


def _trainer(run: Run, resources: Resources, workers: int, board: Any) -> Any:
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if len(machines().nodes) == 1:  # a machine that goes takes its watcher along
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from fsspec.implementations.memory import MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        work,
        train_loop_config={
            "run": pickle.dumps(run),
            "folders": pickle.dumps(_folders(run)),
            "board": board,
            "threads": resources.cpus,
            "gpus": resources.gpus,
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=resources.gpus > 0, resources_per_worker=resources.per_worker
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo", timeout_s=_TIMEOUT_SECONDS
        ),
        run_config=RunConfig(
            name=f"lesa-ray-{uuid.uuid4().hex[:8]}",
            storage_path="/ray-train",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _folders(run: Run) -> tuple[Landmark, ...]:
    """What a worker has to find where it runs."""
    out, blocks, base = run.config.out, run.blocks.url, run.checkpoint
    read = [(f"DATA {blocks}", Storage(blocks), MANIFEST)]
    if base is not None:
        read.append((f"checkpoint {base.base}", base.storage, "config.json"))
    return landmarks([*read, (f"OUT {out}", Storage(out), RUN_FILE)])


def _raise_failure(board: Any) -> None:
    """Raises: UserError if a worker found the input wrong."""
    failure = None
    with contextlib.suppress(RayError):  # the board was lost with the cluster
        failure = ray.get(board.failure.remote(), timeout=60)
    if failure is not None:
        raise UserError(failure)


def _is_no_room(error: BaseException) -> bool:
    """Whether the workers of a round never started, as what they ask for was not free."""
    failure = getattr(error, "controller_failure", None)
    return type(failure).__name__ == "WorkerGroupStartupTimeoutError"


def _cause(error: BaseException) -> str:
    """The worker's own error, which Ray Train wraps. Where a worker was lost it is that: the others then only say that
    a connection was closed."""
    if isinstance(error, RayActorError):
        return f"the process that leads the workers was lost: {_without_ids(str(error))}"[:300]
    failures = getattr(error, "worker_failures", None)
    if not (isinstance(failures, dict) and failures):
        return explain(error)[:300]
    for rank, failure in failures.items():
        lost = getattr(failure, "health_check_failure", None)
        if isinstance(lost, RayError):
            return f"worker {rank} was lost: {_without_ids(str(lost))}"[:300]
    inner = next(iter(failures.values()))
    return explain(getattr(inner, "cause", None) or inner)[:300]


def _without_ids(text: str) -> str:
    """What Ray says of an actor that died, but for the indented lines of ids before it; the machine's address stays."""
    first, *rest = text.splitlines()
    said = [line for line in rest if not line.startswith("\t")]
    addresses = [line.strip() for line in rest if line.startswith("\tip: ")]
    return " ".join([*addresses, *said]) if said else first


def line(progress: Progress) -> str:
    """Progress as a person reads it."""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    parts = [f"step {progress.step:,}/{progress.steps:,}", f"loss {progress.loss:.4f}"]
    if progress.heldout_loss is not None:
        parts.append(f"held out {progress.heldout_loss:.4f}")
    if progress.inserted < 1:
        parts.append(f"{100 * progress.inserted:.0f} % inserted")
    parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.mfu is not None:
        parts.append(f"MFU {100 * progress.mfu:.1f} %")
    return "  ".join([*parts, f"{left} left"])
