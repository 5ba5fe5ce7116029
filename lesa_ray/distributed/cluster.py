"""What is asked of a Ray cluster: which machines there are, what a task gets of them, and more machines if need be.

A cluster that grows has no GPU until something asks for one, and Ray's autoscaler looks at what waits to be scheduled,
not at what a program would like. So where no machine has room for what is asked for, empty actors that ask for that are
left waiting until one has. `ray.autoscaler.sdk.request_resources` would be another means; it is one request for
the whole cluster, each call replaces the last, and Ray Train and Ray Data make it themselves. Placement groups would be
the third; one that waits outlives the process that made it until the whole job ends, which may be a fleet of days, and
then takes machines that nobody uses. Actors add up and go with their process. They are ended as soon as there is room:
Ray's own queue sees to who gets it.

Whether a cluster can grow, and how far, Ray does not say (github.com/ray-project/ray/issues/49501). Decided: a Ray that
this project has embedded in a process cannot, and is marked by a label on its node, so that every process of it knows;
any other may, and is given `GROW_SECONDS`. What cannot come is then told of after that time, and not at once.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lesa_ray.errors import MachineError, UnsharedError, UserError
from lesa_ray.gpu import limit_device, unseeing
from lesa_ray.machines import GROW_SECONDS, SHARE_OF_MEMORY, Machines, lacking, told

EMBEDDED = {"lesa-ray/ray": "embedded"}
"""Label of the one node of a Ray that is embedded in a process."""
LOOK_SECONDS = 5.0
"""Between looks at which machines there are."""
CROWDED_SECONDS = 10.0
"""Without room for a task, after which those that were started are taken to wait and not to be starting."""
OTHERS_HAVE_IT = "others use the cluster's machines"
"""Why there is no room."""

Tell = Callable[[str], None]


def machines() -> Machines:
    """Those of the cluster that are alive now."""
    return Machines.of(node["Resources"] for node in ray.nodes() if node["Alive"])


def check_here(then: str) -> None:
    """To be asked when something was lost. Raises: MachineError, which says what to do `then`, if Ray counts this very
    machine among the lost, without whose raylet Ray ends this process at some next call, without a word."""
    try:
        here = ray.get_runtime_context().get_node_id()
        is_there = any(node["NodeID"] == here and node["Alive"] for node in ray.nodes())
    except Exception:  # then it is another part of Ray that is away
        return
    if not is_there:
        raise MachineError(f"Ray's own process on this machine (raylet) was killed, or does not answer; {then}")


def free() -> Machines:
    """What nobody uses of those machines now."""
    return Machines.of(available_resources_per_node().values())


def may_grow() -> bool:
    """Whether machines may join this cluster."""
    return not any(EMBEDDED.items() <= (node.get("Labels") or {}).items() for node in ray.nodes())


def await_room(
    enough: Callable[[Machines], bool],
    bundle: Mapping[str, float],
    count: int,
    seconds: float,
    tell: Tell,
    otherwise: str = "",
) -> Machines:
    """Wait until the machines there are, busy or not, are `enough`; `count` bundles are asked for meanwhile, each of
    CPU, GPU and memory (bytes).

    tell: is told what is waited for; otherwise: and what happens if that does not come.
    Returns the machines there are, after `seconds` whether they are enough or not."""
    deadline = time.monotonic() + seconds
    waiting: list[Any] = []
    try:
        while True:
            now = machines()
            left = deadline - time.monotonic()
            if enough(now) or left <= 0:
                return now
            if not waiting:
                waiting = [_asking(bundle).remote() for _ in range(count)]
            times = f"{count} × " if count > 1 else ""
            tell(f"waiting up to {seconds:g} s for machines with {times}{told(bundle)} to join the cluster{otherwise}")
            time.sleep(min(LOOK_SECONDS, left))
    finally:
        for actor in waiting:
            ray.kill(actor)


def on_this_machine() -> NodeAffinitySchedulingStrategy:
    """Where an actor lives as long as this process does: elsewhere it would go with a machine that is lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def telling_of_waits(bundle: Mapping[str, float], tell: Tell, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Where Ray waits within for room for a bundle, which it does without a word: tell, from a thread, as long as no
    machine has it, or others use those that have.

    has_begun: whether any of the work within had room already. After that, busy machines may be so with it."""
    stop = threading.Event()

    def watch() -> None:
        begun, crowded = False, None
        while not stop.wait(LOOK_SECONDS):
            with suppress(RayError, OSError, MachineError):
                if not machines().hold(bundle):
                    tell(f"{lacking(bundle)}; waiting for one to join")
                    continue
                begun = begun or has_begun()
                if begun or free().hold(bundle):
                    crowded = None
                    continue
                crowded = crowded or time.monotonic()
                if time.monotonic() - crowded >= CROWDED_SECONDS:
                    tell(f"waiting for room: {OTHERS_HAVE_IT}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LOOK_SECONDS)


def _asking(bundle: Mapping[str, float]) -> Any:
    """An actor's class that needs a bundle for itself and does nothing with it; where its machine is lost, again."""
    asked = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "memory": bundle.get("memory", 0)}
    return ray.remote(**asked, max_restarts=-1)(_Nothing)


class _Nothing:
    pass


@dataclass(frozen=True)
class Share:
    """What a task asks Ray for."""

    gpus: float
    cpus: int
    most_memory: int
    """Bytes of memory that it may ask for and find a machine."""

    def options(self, memory: int) -> dict[str, float]:
        """As `ray.remote` takes them. memory: bytes that the task would like to have."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": min(memory, self.most_memory)}

    def begin(self) -> Literal["cuda", "cpu"]:
        """Keep this process, which is such a task's, to its share. Returns the device that it was given.

        Raises: UnsharedError if PyTorch does not see that: work for a GPU would take days on a core or two."""
        import torch

        torch.set_num_threads(self.cpus)
        if not ray.get_gpu_ids():
            return "cpu"
        if not torch.cuda.is_available():
            raise UnsharedError(
                f"the machine {socket.gethostname()} has a GPU that {unseeing()}; mend that, or give --gpus-per-task 0"
            )
        limit_device(self.gpus)
        return "cuda"


def share_of_task(
    what: str,
    tasks: int,
    *,
    gpus: float | None,
    cpus: int | None,
    tell: Tell,
    device: str | None = None,
    memory: int = 0,
    seconds: float | None = None,
) -> Share:
    """The share of each of `tasks` that run side by side: as asked for, else a GPU where there are some, and the cores
    of the machines that have as many GPUs shared out. Where no machine has room for one task, one is asked for.

    what: what a message calls a task. device: cpu, cuda, or None for whichever there is. memory: bytes that are waited
    for, but done without if no machine with so many comes. seconds: to wait; `GROW_SECONDS` where the cluster may grow.
    Raises: UserError if a GPU is asked for and none given; MachineError if no machine has room for one task."""
    seconds = (GROW_SECONDS if may_grow() else 0.0) if seconds is None else seconds
    now = machines()
    if device == "cuda" and (gpus == 0 or not (gpus or now.most("GPU") or seconds)):
        raise UserError("--device cuda: there is no GPU in this Ray cluster, or --gpus-per-task is 0")
    gpus = now.gpus_each(gpus, device)
    least = {"GPU": gpus, "CPU": float(cpus or 1)}
    wanted = {**least, "memory": float(memory)}
    without = "; without so much memory it goes on after that" if now.having(least).nodes else ""
    now = await_room(lambda there: there.room(wanted) > 0, wanted, 1, seconds, tell, without)
    fit = now.having(least)
    if not fit.nodes:
        waited = f" after {seconds:g} s of waiting" if seconds else ""
        raise MachineError(
            f"{what} asks for {told(least)}: no machine of this cluster has that{waited} (the most are "
            f"{now.most('GPU'):g} GPUs, {now.most('CPU'):g} CPUs); let it grow further, or give --gpus-per-task, "
            "--cpus-per-task"
        )
    cpus = cpus or max(1, int(min(fit.most("CPU"), fit.total("CPU") // tasks)))
    return Share(gpus, cpus, int(SHARE_OF_MEMORY * fit.most("memory")))
