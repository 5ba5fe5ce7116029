"""`pretrain`: a training run on Ray Train, from looking at the input to the checkpoint that comes of it.

    prepare (headers) ▸ room on the cluster ▸ lease and claim OUT ▸ Ray Train: workers train ▸ export ▸ config.json

Decides
- Workers find the last complete checkpoint in OUT themselves; Ray Train is told of none. Its own storage is a
  filesystem in memory: nothing it would keep there is needed, and a store that fails has one way less to stop the run.
- It starts the workers again after a fault, on as many machines as there are then if `workers` is a range.
- A worker that finds the input wrong (a loss that is no number, say) leaves the reason on a board that outlives it:
  nothing is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.cluster import await_room, machines, may_grow
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.ray_runner import on_this_machine, start_ray
from lesa_ray.distributed.tasks import POLL_SECONDS, Tasks
from lesa_ray.distributed.tenancy import Tenant, tenancy
from lesa_ray.distributed.train_worker import Board, work
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Listener, Silent
from lesa_ray.faults import explain, reaching
from lesa_ray.machines import Machines, told
from lesa_ray.training.export import ExportPlan, OutFile, write_file
from lesa_ray.training.finish import Trained, finish_run, is_trained, trained_result
from lesa_ray.training.lineage import replayed
from lesa_ray.training.loop import Progress
from lesa_ray.training.metrics import check_loggers
from lesa_ray.training.run import Run, claim, out_state, prepare
from lesa_ray.training.train_settings import TrainConfig

log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Resources:
    """What a worker asks Ray for, and how many there may be."""

    fewest: int
    most: int
    cpus: int
    gpus: float

    @property
    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def pretrain(config: TrainConfig, listener: Listener | None = None, *, tenant: Tenant | None = None) -> Trained:
    """Train, or go on training, or find that it is done; the result lies at `config.out`.

    tenant: who may work there, if the caller has seen to it; by default this call does.
    Raises: UserError for wrong input; MachineError for a fault, after which the same call goes on."""
    listener = listener or Silent()
    check_loggers(config.loggers)
    listener.phase("reading the headers", 0)
    run = prepare(config, gpus=False)  # wrong input, and a run that is done, are found before Ray is started
    with reaching(f"OUT {config.out}", "cannot be written"):
        state = out_state(run)
    if state == "done":
        return trained_result(run, reused=True)
    listener.phase("starting Ray", 0)
    start_ray()
    if state == "fresh" and config.precision == "auto" and machines().gpus_each(config.gpus_per_worker):
        run = prepare(config, gpus=True)
    resources = None
    if not is_trained(run):
        if (warning := replayed(run)) is not None:
            log.warning(warning)
        resources = wait_for_room(config, listener)
    with tenancy(config.out, listener, tenant) as tenant:
        with reaching(f"OUT {config.out}", "cannot be written"):
            state = out_state(run)  # as whoever was at work there until now left it
        if state == "done":
            return trained_result(run, reused=True)
        if resources is not None:
            with reaching(f"OUT {config.out}", "cannot be written"):
                claim(run)
            _fit(run, resources, listener)
        tenant.confirm()
        finish_run(run, listener, _export_by_tasks if _is_shared(run) else None)
    return trained_result(run, resumed=state == "resume")


def _is_shared(run: Run) -> bool:
    """Whether more machines than this one can write at OUT."""
    return not Storage(run.config.out).is_local or len(machines().nodes) > 1


def _export_by_tasks(plan: ExportPlan, files: Sequence[OutFile]) -> None:
    """Write files of weights as Ray tasks, each on a core of its own. Raises: UserError, MachineError."""
    health = Health(plan.out, "train")
    shared = ray.put(plan)
    sizes = {file.name: file.nbytes for file in files}
    with Tasks[str](write_file) as tasks:
        for file in files:
            tasks.start(file.name, file.name, shared, file, num_cpus=1)
        while tasks:
            for name, _ in tasks.ended():
                health.task_ended(sizes[name])


def _resources(config: TrainConfig, there: Machines) -> tuple[Resources, int]:
    """What a worker asks for, and how many such workers the machines can give.

    Where cores are not asked for, each worker gets as many as leave room for the most workers, else for the fewest."""
    fewest, most = config.worker_range
    gpus = there.gpus_each(config.gpus_per_worker)
    choices = [config.cpus_per_worker or (1 if gpus else 0)]
    if not choices[0]:
        choices = list(range(max(1, int(there.most("CPU"))), 0, -1))
    room = {cpus: there.room(Resources(fewest, most, cpus, gpus).per_worker) for cpus in choices}
    fitting = [cpus for wanted in (most, fewest) for cpus in choices if room[cpus] >= wanted]
    cpus = fitting[0] if fitting else choices[-1]
    return Resources(fewest, most, cpus, gpus), room[cpus]


def wait_for_room(config: TrainConfig, listener: Listener) -> Resources:
    """What a worker gets, as soon as the cluster's machines can give the fewest workers; it is asked for more of them.

    Raises: UserError if they cannot and it cannot grow; MachineError if it has not grown so far in `config.wait`."""
    grows = may_grow()
    least, _ = _resources(config, machines())
    there = await_room(
        lambda there: _resources(config, there)[1] >= least.fewest,
        least.per_worker,
        least.fewest,
        config.wait if grows else 0.0,
        lambda text: listener.phase(text, 0),
    )
    resources, room = _resources(config, there)
    if room >= resources.fewest:
        return resources
    can = f"workers {resources.fewest} of {told(resources.per_worker)} each: the cluster can give {room}"
    ask = "ask for fewer, or for less of each (cpus_per_worker, gpus_per_worker)"
    if grows:
        raise MachineError(f"{can} after {config.wait:g} s of waiting; let it grow further, or {ask}")
    raise UserError(f"{can}; {ask}")


def _fit(run: Run, resources: Resources, listener: Listener) -> None:
    """Let Ray Train run the workers until the last step is done. Raises: UserError, MachineError."""
    listener.phase(f"starting {resources.fewest} worker{'s' if resources.fewest > 1 else ''}", 0)
    place = on_this_machine()
    board = ray.remote(num_cpus=0, max_concurrency=4, scheduling_strategy=place)(Board).remote()
    controllers: list[Any] = []
    try:
        with _watching(board, run, listener):
            trainer = _trainer(run, resources, board)
            # Ray's own would take Ctrl-C for the rest of the process, and end it with exit code 0. It knows the actor
            # that the workers go with, without which they would train on when this call has been interrupted.
            trainer._register_sigint_handler = controllers.append
            trainer.fit()
        _raise_failure(board)
    except (UserError, MachineError):
        raise
    except Exception as error:
        _raise_failure(board)
        cause = _cause(error)
        raise MachineError(f"training stopped: {cause}; the same command goes on from the last checkpoint") from error
    finally:
        for actor in (*controllers, board):
            ray.kill(actor)


def _raise_failure(board: Any) -> None:
    """Raises: UserError if a worker found the input wrong."""
    try:
        failure = ray.get(board.failure.remote(), timeout=60)
    except RayError:  # the board was lost with the cluster
        return
    if failure is not None:
        raise UserError(failure) from None


def _trainer(run: Run, resources: Resources, board: Any) -> Any:
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if len(machines().nodes) == 1:  # a machine that goes takes its watcher along
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from fsspec.implementations.memory import MemoryFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    elastic = resources.fewest != resources.most
    return TorchTrainer(
        work,
        train_loop_config={"run": pickle.dumps(run), "board": board, "threads": resources.cpus, "gpus": resources.gpus},
        scaling_config=ScalingConfig(
            num_workers=(resources.fewest, resources.most) if elastic else resources.fewest,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker,
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if resources.gpus else "gloo", timeout_s=_TIMEOUT_SECONDS
        ),
        run_config=RunConfig(
            name=f"lesa-ray-{uuid.uuid4().hex[:8]}",
            storage_path="/ray-train",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            failure_config=FailureConfig(max_failures=run.config.retries),
        ),
    )


@contextlib.contextmanager
def _watching(board: Any, run: Run, listener: Listener) -> Iterator[None]:
    """Show the run's progress while the block runs."""
    stop = threading.Event()
    health = Health(Storage(run.config.out).url, "train")

    def watch() -> None:
        last: Progress | None = None
        while not stop.wait(POLL_SECONDS):
            try:
                values: dict[str, Any] | None = ray.get(board.get.remote(), timeout=30)
            except Exception:  # the board is a comfort; the run does not depend on it
                continue
            progress = None if values is None else Progress(**values)
            if progress is not None and progress != last:
                if last is None:
                    listener.phase("training", run.steps)
                last = progress
                listener.progress(progress.step, line(progress))
                health.trained(progress)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)


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


def _cause(error: BaseException) -> str:
    """The worker's own error, which Ray Train wraps."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict) and failures:
        inner = next(iter(failures.values()))
        return explain(getattr(inner, "cause", None) or inner)[:300]
    return explain(error)[:300]
