"""Units and shards as Ray tasks.

Each unit is a task with its own CPUs, GPU and memory; the largest starts first, one starts as soon as those it reads
from are done. A task leaves its tensors in storage and returns a record of a few hundred bytes, so nothing large
travels. When a worker dies Ray starts the task again, on the same or another machine: a unit's file appears only when
it is whole, and the same seed gives the same bytes.

Ray is the running cluster's where there is one (RAY_ADDRESS, `ray start`, a submitted job), else an embedded local one.
An embedded one has this process's environment. A cluster's machines have their own, and are given what says here where
stores are (`PASSED_ON`); no secrets, as Ray shows an environment that travels in its logs and dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import sys
import time
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lesa_ray.checkpoint.mark import MARK_FILE
from lesa_ray.checkpoint.shards import Shard
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.checkpoint.writer import write_shard
from lesa_ray.distributed.address import await_head, check_address, named_ray, session_root
from lesa_ray.distributed.cluster import EMBEDDED, Share, share_of_task
from lesa_ray.distributed.health import Health
from lesa_ray.distributed.hindrance import few_processes, hindrance
from lesa_ray.distributed.shared import Landmark, check_landmarks, landmarks
from lesa_ray.distributed.tasks import POLL_SECONDS, Tasks
from lesa_ray.errors import MachineError
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.memory import INTERPRETER_BYTES
from lesa_ray.expansion.method import Unit
from lesa_ray.expansion.runner import Listener, own_peak_memory, weight_of
from lesa_ray.expansion.workbench import run_unit
from lesa_ray.faults import explain
from lesa_ray.interrupt import as_before
from lesa_ray.job_folder import job_environment
from lesa_ray.places import shown

log = logging.getLogger(__name__)

PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
"""Environment variables of this process that tasks on a cluster get."""
HEAD_SECONDS = 20.0
"""For a cluster's head to be reached: it may be coming up beside this process, or be started again."""
_BOARD_SECONDS = 30


def start_ray() -> bool:
    """Connect to the running cluster, or start an embedded local Ray; nothing if Ray is up in this process.

    RAY_ADDRESS names the cluster, or is `local` for an embedded Ray beside a running cluster; without it, it is what
    `ray start` left on this machine. Returns whether this call started an embedded Ray.
    Raises: UserError if RAY_ADDRESS is no address; MachineError if the cluster cannot be reached, or none started.
    """
    if ray.is_initialized():
        return False
    check_address()
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = named_ray()
    try:
        if address not in ("local", None):
            await_head(address, HEAD_SECONDS)
            with as_before():
                ray.init(address=address, runtime_env=_passed_on(), **quiet)
            return False
    except (ray.exceptions.RayError, OSError, ValueError, RuntimeError) as error:
        left = "; `ray start` left its address here: run `ray stop` if it is gone, or set RAY_ADDRESS=local"
        hint = "; RAY_ADDRESS names it" if os.environ.get("RAY_ADDRESS") else left
        raise MachineError(f"Ray cluster {address}: cannot be reached ({explain(error)[:200]}){hint}") from error
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers share the cores: a thread that waits must not spin
    _own_token()
    if few := few_processes():
        log.warning("%s", few)
    for again in (True, False):
        try:
            with as_before():
                ray.init(address="local", include_dashboard=False, labels=EMBEDDED, runtime_env=_own_python(), **quiet)
            break
        except Exception as error:  # Ray has no class of its own for a node that does not come up
            # On a machine that is busy, one gives up on its agent after 15 seconds (ray-project/ray#65983).
            if not (again and "timed out during startup" in str(error)):
                why = hindrance(error, session_root())
                raise MachineError(f"Ray does not start on this machine ({explain(error)[:200]}){why}") from error
    return True


def _own_token() -> None:
    """Give an embedded Ray a token of its own, where none is set. Its ports are open to all interfaces, whatever
    address the node is given, so the token is what keeps others out.

    Ray would put one into the home folder, readable to all, and not start where there is no home or its disk is full or
    read-only (a container's user without a name, a quota, a service). Of the environment only this user's processes
    and the workers know. One that is in the home folder stays in use, as a cluster that this process connects to later
    may ask for it."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    folder = os.path.expanduser("~/.ray")
    if not os.access(os.path.join(folder, "auth_token"), os.R_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)


def _own_python() -> dict[str, Any]:
    """This interpreter, as Ray's runtime environment, where its path means something else to a shell.

    For workers with an environment of their own, as Ray Train's are, Ray puts the path into a shell's command as it is:
    with a space in it they never come up, and Ray tries for ever. A cluster's machines have paths of their own."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def _passed_on() -> dict[str, Any]:
    """What of this process's environment goes to a cluster, as Ray's runtime environment.

    What the submitted job's own names is left out: it is there already, and Ray refuses to hear it twice."""
    known = job_environment().get("env_vars") or {}
    passed = {}
    for name in PASSED_ON:
        value = os.environ.get(name)
        if value is None or name in known:
            continue
        if value != shown(value):
            log.warning(
                "%s: holds a user or a password, which Ray would show; the cluster's machines are not given it, set it "
                "in their own environment",
                name,
            )
            continue
        passed[name] = value
    return {"env_vars": passed} if passed else {}


def on_this_machine() -> NodeAffinitySchedulingStrategy:
    """Where an actor lives as long as this process does: elsewhere it would go with a machine that is lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Board:
    """Keeps how far each unit is, for the driver to look at."""

    def __init__(self) -> None:
        self._state: dict[str, tuple[str, float]] = {}

    def put(self, unit: str, phase: str, share: float) -> None:
        self._state[unit] = (phase, share)

    def get(self) -> dict[str, tuple[str, float]]:
        return self._state


def new_board() -> Any:
    """A board, as an actor beside this process."""
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_machine())(Board).remote()


def on_board(board: Any) -> dict[str, tuple[str, float]] | None:
    """What is on a board; None where it does not answer, as no work depends on it."""
    with contextlib.suppress(RayError):
        state: dict[str, tuple[str, float]] = ray.get(board.get.remote(), timeout=_BOARD_SECONDS)
        return state
    return None


def _unit_task(
    expansion: Expansion, unit: Unit, share: Share, board: Any, folders: tuple[Landmark, ...]
) -> tuple[dict[str, Any], int]:
    check_landmarks(folders)
    board.put.remote(unit.name, "starting", 0.0)
    device = share.begin()
    last = 0.0

    def progress(phase: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            board.put.remote(unit.name, phase, share)

    record = run_unit(
        expansion.job,
        unit,
        expansion.made_in,
        expansion.checkpoints,
        expansion.job.config.out,
        device=device,
        threads=share.cpus,
        progress=progress,
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


def _shard_task(out: str, shard: Shard, folders: tuple[Landmark, ...]) -> int:
    check_landmarks(folders)
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
        board, health = new_board(), Health(Storage(config.out).url, "expand")
        waiting = sorted(units, key=lambda unit: -unit.flops)
        here = {unit.name for unit in units}
        records: dict[str, Any] = {}
        try:
            with Tasks[str](_unit_task, begun=lambda: on_board(board)) as tasks:
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
        finally:
            ray.kill(board)
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
        with Tasks[str](_shard_task) as tasks:
            for shard in shards:
                tasks.start(shard.file, shard.file, out, shard, folders, num_cpus=1)
            while tasks:
                for file, peak in tasks.ended():
                    self._peak = max(self._peak, peak)
                    written += sizes[file]
                    health.task_ended(sizes[file])
                listener.progress(written, tasks.told(", ".join(list(tasks)[:2])))

    def peak_memory(self) -> int:
        return max(self._peak, own_peak_memory())
