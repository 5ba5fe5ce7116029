"""Ray tasks side by side: waited for as they end, cancelled together when one of them finds the input wrong.

A task whose worker is lost, or that meets a fault of the machine, is started again by Ray, three times; not where its
GPU's memory is full, as it would be again. Where what the others finish stays and takes long, such a fault ends none
that has begun. Where machines with room for a task were lost Ray would wait for others without a word, for ever.

A task with a GPU has a process of its own. CUDA takes the GPU that a process sees first for good, and PyTorch keeps
what it had of it, so a second task in the same process would compute on the first one's GPU, in what that one left. Ray
would see to it by itself only if the number of GPUs were part of the function's definition."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Hashable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from lesa_ray.distributed.cluster import CROWDED_SECONDS, LOOK_SECONDS, OTHERS_HAVE_IT, check_here, free, machines
from lesa_ray.distributed.other_code import other_code
from lesa_ray.errors import FullError, MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.machines import GROW_SECONDS, lacking

POLL_SECONDS = 0.5
"""How long a look for tasks that have ended may take, and how often one that runs tells how far it is."""
_RETRIES = 3
_ENDING_SECONDS = 15.0
"""For the processes of cancelled tasks to be gone."""

Key = TypeVar("Key", bound=Hashable)


class _Started(NamedTuple):
    """A task that was started."""

    key: Any
    name: str
    needs: dict[str, float]
    """What it needs of one machine."""


class Tasks(Generic[Key]):
    """Calls of one function as Ray tasks, each by what it is for. A context: what still runs at its end is cancelled.

    Iterating gives what is under way."""

    def __init__(self, call: Callable[..., Any], begun: Callable[[], Collection[Key] | None] | None = None) -> None:
        """begun: which tasks have begun, as far as is known, or None where nothing is. With it a fault cancels only the
        others, and is raised when the rest have ended; without it the first task that fails ends all."""
        retried: dict[str, Any] = {"max_retries": _RETRIES, "retry_exceptions": [MachineError]}
        once = _full_at_once(call)
        self._task, self._gpu_task = ray.remote(**retried)(once), ray.remote(**retried, max_calls=1)(once)
        self._running: dict[Any, _Started] = {}
        self._stranded: dict[Any, float] = {}
        self._looked = time.monotonic()
        self._crowded: float | None = None
        self._begun = begun
        self.fault: Exception | None = None
        """What is raised when the tasks that had begun have ended; from then on nothing is to be started."""

    def __enter__(self) -> Tasks[Key]:
        return self

    def __exit__(self, *error: object) -> None:
        running = list(self._running)
        for reference in running:
            ray.cancel(reference, force=True)
        if running:  # what they write must not come after what the caller removes
            ray.wait(running, num_returns=len(running), timeout=_ENDING_SECONDS)

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Key]:
        return iter([started.key for started in self._running.values()])

    def start(self, key: Key, name: str, *args: Any, **resources: Any) -> None:
        """name: in Ray's lists and in messages; resources: as `ray.remote` takes them."""
        task = self._gpu_task if resources.get("num_gpus") else self._task
        asked = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        needs = {kind: float(resources.get(option) or 0) for kind, option in asked.items()}
        self._running[task.options(name=name, **resources).remote(*args)] = _Started(key, name, needs)

    def told(self, under_way: str) -> str:
        """What a person is told: for what is waited, where machines were lost and none that is left has room for some
        task; else what is under way; and where nothing is, as others have what there is, that."""
        for reference in self._stranded:
            if reference in self._running:
                return f"{lacking(self._running[reference].needs)}; waiting for one to join"
        if under_way:
            self._crowded = None
        crowded = self._crowded is not None and time.monotonic() - self._crowded >= CROWDED_SECONDS
        return f"waiting for room: {OTHERS_HAVE_IT}" if crowded else under_way

    def ended(self) -> Iterator[tuple[Key, Any]]:
        """Tasks that have ended, with their results; none where none does for half a second. Raises: as `result_of`."""
        for key, end in self.ends():
            try:
                result = end()
            except UserError:
                raise
            except Exception as error:
                if self._begun is None:
                    raise
                if self.fault is None:
                    self.fault = error
                    self._cancel_waiting(self._begun())
            else:
                yield key, result
        if self.fault is not None and not self._running:
            raise self.fault

    def ends(self) -> Iterator[tuple[Key, Callable[[], Any]]]:
        """The same for who goes on when one fails: with a call that gives the result, or raises as `result_of`."""
        done, _ = ray.wait(list(self._running), timeout=POLL_SECONDS)
        for reference in done:
            key, name, _ = self._running.pop(reference)
            yield key, partial(result_of, reference, name)
        yield from self._given_up()

    def _given_up(self) -> Iterator[tuple[Key, Callable[[], Any]]]:
        """Tasks for which no machine has been there for so long that none is expected."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked, before, there, left = now, self._stranded, machines(), free()
        has_room = any(left.hold(started.needs) for started in self._running.values())
        self._crowded = None if has_room else self._crowded or now
        self._stranded = {
            reference: before.get(reference, now)
            for reference, started in self._running.items()
            if not there.hold(started.needs)
        }
        for reference, since in self._stranded.items():
            if now - since >= GROW_SECONDS:
                ray.cancel(reference, force=True)
                key, name, needs = self._running.pop(reference)
                yield key, partial(_raise, f"{name}: {lacking(needs)}, and none joined in {GROW_SECONDS:g} s")

    def _cancel_waiting(self, begun: Collection[Key] | None) -> None:
        for reference, started in self._running.items():
            if begun is not None and started.key not in begun:
                ray.cancel(reference)


def _full_at_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, with a full GPU as what it returns: what is raised Ray would have done again."""

    @functools.wraps(call)
    def run(*args: Any) -> Any:
        try:
            return call(*args)
        except FullError as error:
            return error

    return run


def _raise(message: str) -> Any:
    raise MachineError(message)


def result_of(reference: Any, what: str) -> Any:
    """A task's result. Raises: the task's own error, or MachineError if its workers were lost."""
    try:
        result = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayError) and (lack := other_code(error, what)):
            raise lack from error
        raise error.cause if error.cause is not None else error from None
    except RayError as error:
        check_here("the same command goes on from what was finished")
        raise MachineError(f"{what}: lost after {_RETRIES} retries ({explain(error)[:200]})") from error
    if isinstance(result, FullError):
        raise result
    return result
