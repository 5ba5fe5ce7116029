"""`lesa-ray fleet`: the stages of a graph as Ray tasks, as many at a time as fit, none of them twice.

    graph ▸ of each stage whose inputs are there: finished? someone's? else its lease ▸ a task ▸ its record ▸ the next

A stage runs while this process holds its lease; a lease that is lost ends the stage's task, and with it, as Ray ends
what an ended task has begun, all of its tasks and workers. A stage that another fleet is making is waited for. A fault
of the machine is tried again, wrong input is not; what needs a stage that failed is left out, everything else goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lesa_ray.distributed.board import new_board, on_board
from lesa_ray.distributed.cluster import machines
from lesa_ray.distributed.shared import landmarks
from lesa_ray.distributed.stage_task import Done, run_stage
from lesa_ray.distributed.start import start_ray
from lesa_ray.distributed.tasks import POLL_SECONDS, result_of
from lesa_ray.errors import MachineError, UnsharedError, UserError
from lesa_ray.faults import explain, reaching
from lesa_ray.fleet.schedule import choose, demand, total_of
from lesa_ray.fleet.settings import Amount, GraphConfig
from lesa_ray.fleet.stages import Stage
from lesa_ray.fleet.state import THREADS, Outcome, Standing, leave_plan, look
from lesa_ray.interrupt import signals_interrupt
from lesa_ray.store.catalog import Store, begun_file
from lesa_ray.store.lease import Lease
from lesa_ray.store.record import make_record

_LOOK_SECONDS = 3.0  # between looks at a stage that another fleet is making
_TELL_SECONDS = 10.0
_PAUSE_SECONDS = 5.0  # before a stage is tried again
_LOST_RETRIES = 3
_STORE_FAULTS = 100  # in a row, of one stage: five minutes of a store that does not answer

Say = Callable[[str, str], None]
Settled = Callable[[Outcome], None]


def _unheard(_: Outcome) -> None: ...


@dataclass
class _Running:
    """A stage under way."""

    stage: Stage
    place: str
    given: Mapping[str, Any]
    why: str
    lease: Lease
    amount: Amount
    node: str | None
    """Where it was to be led from."""
    told: str = ""
    told_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False


def run_fleet(config: GraphConfig, stages: Sequence[Stage], say: Say, settled: Settled = _unheard) -> list[Outcome]:
    """Make every stage that is not finished; what became of each, in their order.

    say: is told of a stage's progress, by its id ("" for the fleet). settled: is told what became of a stage as soon as
    that is known. Raises: MachineError if there is no Ray, or the store does not answer at the beginning, or the
    cluster is lost; UserError if the store cannot be written."""
    store = Store(config.store, config.lease)
    with reaching(f"store {config.store}", "cannot be written"):
        leave_plan(store, config, stages)
    fleet = _Fleet(config, store, stages, say, settled)
    try:
        with signals_interrupt():  # leases are let go
            fleet.run()
    except RayError as error:
        raise MachineError(f"the Ray cluster was lost ({explain(error)[:200]}); the same command goes on") from error
    finally:
        fleet.stop()
    return [fleet.outcomes[stage.id] for stage in stages]


class _Fleet:
    """The stages that wait, those under way, and what became of the others."""

    def __init__(self, config: GraphConfig, store: Store, stages: Sequence[Stage], say: Say, settled: Settled) -> None:
        self._config, self._store, self._say, self._settled = config, store, say, settled
        self._waiting = {stage.id: stage for stage in stages}
        self._running: dict[Any, _Running] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._places: dict[str, str] = {}
        self._later: dict[str, float] = {}
        self._looked: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._faults: dict[str, int] = {}
        self._told: dict[str, str] = {}
        self._holder = f"{config.what} {config.name} on {socket.gethostname()}, process {os.getpid()}"
        self._board: Any = None
        self._task: Any = None

    def run(self) -> None:
        """Until nothing waits and nothing runs."""
        while self._waiting or self._running:
            before = len(self._waiting)
            self._drop_hopeless()
            self._start()
            if self._running:
                self._collect()
                self._tell()
            elif len(self._waiting) == before:  # others are at work on what is left
                time.sleep(POLL_SECONDS)

    def _connect(self) -> None:
        """Get a cluster, when the first stage has to be made."""
        if self._board is not None:
            return
        self._say("", "starting Ray")
        start_ray()
        self._board = new_board()
        self._task = ray.remote(num_cpus=0, max_retries=_LOST_RETRIES)(run_stage)

    def stop(self) -> None:
        """End what still runs, and let others have it."""
        for reference, running in self._running.items():
            self._cancel(reference, running)
        for running in self._running.values():
            running.lease.release()
        if self._board is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._board)

    def _drop_hopeless(self) -> None:
        """Settle the stages that can never be made."""
        for stage in list(self._waiting.values()):
            lost = [need for need in stage.needs if need in self.outcomes and need not in self._places]
            if stage.problem is not None:
                self._settle(stage, Outcome(stage.id, "failed", stage.problem))
            elif lost:
                self._settle(stage, Outcome(stage.id, "skipped", f"needs {lost[0]}"))

    def _start(self) -> None:
        """Begin what can begin, and fits."""
        now = time.monotonic()
        ready = [
            stage
            for stage in self._waiting.values()
            if all(need in self._places for need in stage.needs) and self._later.get(stage.id, 0.0) <= now
        ]
        looks = self._look_at(ready)
        ready = [stage for stage in ready if stage.id not in looks or not self._is_settled(stage, looks[stage.id])]
        if not ready:
            return
        self._connect()
        there = machines()
        total = total_of(there, self._config.budget)
        amounts = {s.id: s.resources or demand(s.settings("out", self._places), there) for s in ready}
        running = [one.amount for one in self._running.values()]
        for stage in choose(ready, lambda one: amounts[one.id], running, total, self._config.at_once):
            with self._store_faults(stage):
                self._begin(stage, amounts[stage.id])

    def _look_at(self, stages: Sequence[Stage]) -> dict[str, Future[Standing]]:
        """Looks at stages, by their ids; not at those that wait for room and were looked at just now: they are looked
        at again when they have their leases."""
        now = time.monotonic()
        due = [s for s in stages if now - self._looked.get(s.id, -_LOOK_SECONDS) >= _LOOK_SECONDS]
        with ThreadPoolExecutor(THREADS) as pool:
            return {s.id: pool.submit(look, self._store, s.identity, s.label) for s in due if s.identity is not None}

    def _is_settled(self, stage: Stage, looked: Future[Standing]) -> bool:
        """Whether a stage turned out to be finished, or another fleet's to finish for now."""
        assert stage.identity is not None
        with self._store_faults(stage):
            standing = looked.result()
            self._looked[stage.id] = time.monotonic()
            self._faults.pop(stage.id, None)
            if standing.state == "complete":
                assert standing.record is not None
                same = "" if standing.place == stage.identity.place(stage.label) else f", the same as {standing.place}"
                how = "made meanwhile" if stage.id in self._told else "complete"
                self._places[stage.id] = self._store.folder(standing.place).url
                done = Outcome(stage.id, "complete", how + same, standing.place, nbytes=standing.record["bytes"])
                self._settle(stage, done)
                return True
            if standing.state == "running":
                self._wait(stage, f"{standing.why}; waits, {self._config.lease:.0f} s at most if that has died")
                return True
            return False
        return True

    def _begin(self, stage: Stage, amount: Amount) -> None:
        """Get a stage's lease and start its task."""
        assert stage.identity is not None
        lease = self._store.lease(stage.identity, self._holder)
        if lease is None:
            self._wait(stage, "another fleet has just begun it")
            return
        try:
            standing = look(self._store, stage.identity, stage.label)
            if standing.state == "complete":  # between the last look and the lease
                self._looked.pop(stage.id, None)
                lease.release()
                return
            begun = self._store.begun(standing.place)
            why = self._store.why(stage.identity, stage.label)
            if begun is not None and begun.failure:
                why = f"failed before ({begun.failure}), is tried again"
            self._store.begin(standing.place, stage.identity, self._holder)
            folders = landmarks([(f"store {self._store.url}", self._store.control, begun_file(standing.place))])
        except BaseException:
            lease.release()
            raise
        out = self._store.folder(standing.place).url
        settings = stage.settings(out, self._places)
        self._say(stage.id, f"begins: {why}")
        node = self._quietest_node()
        strategy = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=True)
        task = self._task.options(name=f"stage {stage.id}", scheduling_strategy=strategy)
        reference = task.remote(settings, out, stage.id, self._board, folders)
        given = settings.model_dump(mode="json")
        self._running[reference] = _Running(stage, standing.place, given, why, lease, amount, node)
        del self._waiting[stage.id]

    def _quietest_node(self) -> str | None:
        """The machine that leads the fewest of this fleet's stages; not one without CPUs, as heads of clusters are,
        whose memory is for the cluster's books."""
        leading = [running.node for running in self._running.values()]
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
        return min(nodes, key=leading.count, default=None)

    def _collect(self) -> None:
        """Take in what has ended; end what is no longer this process's."""
        ended, _ = ray.wait(list(self._running), timeout=POLL_SECONDS)
        for reference in ended:
            running = self._running.pop(reference)
            try:
                self._end(running, result_of(reference, running.stage.id))
                with contextlib.suppress(MachineError, OSError):  # then the file stays
                    self._store.settle(running.lease)
            except UserError as error:
                self._fail(running, _told_from(running.node, error), again=False)
            except Exception as error:
                self._fail(running, explain(error), again=True)
            finally:
                running.lease.release()
        for reference, running in self._running.items():
            if not running.lease.held and not running.cancelled:
                self._say(running.stage.id, f"is no longer this {self._config.what}'s: its lease ran out; stopped")
                self._cancel(reference, running)

    def _end(self, running: _Running, done: Done) -> None:
        """Write the record of a stage that ended well. Raises: MachineError if it is no longer this process's."""
        stage = running.stage
        assert stage.identity is not None
        record = make_record(
            stage.identity, stage.label, given=running.given, started=done["started"], seconds=done["seconds"],
            metrics=done["metrics"], files=done["files"],
        )  # fmt: skip
        if not running.lease.held:
            raise MachineError("its lease ran out")
        self._store.finish(running.place, record)
        self._places[stage.id] = self._store.folder(running.place).url
        outcome = Outcome(stage.id, "made", running.why, running.place, record["seconds"], record["bytes"])
        self._say(stage.id, f"made in {record['seconds']:.1f} s, {record['bytes'] / 1e6:.2f} MB: {running.place}")
        self._note(outcome)

    def _fail(self, running: _Running, message: str, *, again: bool) -> None:
        """Note what stopped a stage; try again what may be better next time."""
        stage = running.stage
        message = " ".join(message.split())[:500]
        if running.cancelled or not running.lease.held:
            self._waiting[stage.id] = stage
            self._wait(stage, "waits: it was another fleet's to go on with")
            return
        assert stage.identity is not None
        with contextlib.suppress(Exception):  # a comfort for `status`; the store may be what has failed
            self._store.begin(running.place, stage.identity, self._holder, message)
        tries = self._tries[stage.id] = self._tries.get(stage.id, 0) + 1
        if again and tries <= self._config.retries:
            self._say(stage.id, f"stopped: {message}; is tried again ({tries} of {self._config.retries})")
            self._waiting[stage.id] = stage
            self._later[stage.id] = time.monotonic() + _PAUSE_SECONDS
            return
        self._say(stage.id, f"failed: {message}")
        self._note(Outcome(stage.id, "failed", message, running.place))

    def _settle(self, stage: Stage, outcome: Outcome) -> None:
        self._waiting.pop(stage.id, None)
        self._say(stage.id, outcome.why if outcome.how == "complete" else f"{outcome.how}: {outcome.why}")
        self._note(outcome)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.id] = outcome
        self._settled(outcome)

    def _wait(self, stage: Stage, why: str) -> None:
        self._looked.pop(stage.id, None)
        self._later[stage.id] = time.monotonic() + _LOOK_SECONDS
        if self._told.get(stage.id) != why:
            self._told[stage.id] = why
            self._say(stage.id, why)

    @contextlib.contextmanager
    def _store_faults(self, stage: Stage) -> Iterator[None]:
        """Put a stage off while the store does not answer, and give it up when that goes on."""
        try:
            yield
        except UserError as error:
            self._settle(stage, Outcome(stage.id, "failed", str(error)))
        except (MachineError, OSError) as error:
            faults = self._faults[stage.id] = self._faults.get(stage.id, 0) + 1
            if faults > _STORE_FAULTS:
                self._settle(stage, Outcome(stage.id, "failed", explain(error)))
            else:
                self._wait(stage, f"waits: {explain(error)}")

    def _cancel(self, reference: Any, running: _Running) -> None:
        running.cancelled = True
        with contextlib.suppress(RayError, ValueError):
            ray.cancel(reference, force=True, recursive=True)

    def _tell(self) -> None:
        """Say how far stages are: a new phase at once, progress now and then."""
        state = on_board(self._board) or {}
        now = time.monotonic()
        for running in self._running.values():
            phase, share = state.get(running.stage.id, ("", 0.0))
            new_phase = phase.split(":", 1)[0] != running.told.split(":", 1)[0]
            if phase and (new_phase or (phase != running.told and now - running.told_at > _TELL_SECONDS)):
                running.told, running.told_at = phase, now
                self._say(running.stage.id, phase if not share else f"{100 * share:.0f} % {phase}")


def _told_from(node: str | None, error: UserError) -> str:
    """What a stage found wrong, and on which machine if not on this one: a folder that is missing there may be here."""
    names = {one["NodeID"]: one["NodeManagerHostname"] for one in ray.nodes()}
    if node not in names or node == ray.get_runtime_context().get_node_id() or isinstance(error, UnsharedError):
        return str(error)
    return f"{error} (found on the machine {names[node]})"
