"""`lesa-ray compare`: a comparison's stages on Ray, its `comparison.json` brought up to date as runs end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lesa_ray.comparison.collect import Collector
from lesa_ray.comparison.graph import Comparison
from lesa_ray.distributed.cluster import machines
from lesa_ray.distributed.fleet import Say, run_fleet
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain, reaching
from lesa_ray.fleet.state import Outcome
from lesa_ray.store.catalog import Store, utc_now

_WRITE_SECONDS = 30.0


def run_comparison(comparison: Comparison, say: Say) -> tuple[dict[str, Any], list[Outcome]]:
    """Make whatever is missing; the content of `comparison.json`, and what became of each stage.

    Raises: as `run_fleet`."""
    config = comparison.config
    collector = Collector(comparison, Store(config.store, config.lease))
    known: dict[str, Outcome] = {}
    machine: dict[str, Any] | None = None

    with reaching(f"store {config.store}"):
        displaced = collector.displaced()
    for note in (*comparison.notes, *([displaced] if displaced else [])):
        say("", note)
    with _Writing(collector, say) as writing:

        def settled(outcome: Outcome) -> None:
            nonlocal machine
            known[outcome.id] = outcome
            if outcome.how == "made":
                machine = _cluster()
            writing.due(machine, known)

        outcomes = run_fleet(config, comparison.stages, say, settled)
    content = collector.collect(machine, known)
    say("", f"written: {collector.write(content)}; `lesa-ray report {collector.storage.url}` draws it")
    return content, outcomes


class _Writing:
    """Brings `comparison.json` up to date in a thread, as reading the runs must not keep a stage from being started. A
    context: at its end none of it is under way, and an error or interruption does not wait for all of the reading."""

    def __init__(self, collector: Collector, say: Say) -> None:
        self._collector, self._say = collector, say
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._since = time.monotonic()

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._collector.give_up()
        self._pool.shutdown()

    def due(self, machine: Mapping[str, Any] | None, outcomes: Mapping[str, Outcome]) -> None:
        """Begin to, unless it was not long ago, or is still under way. Raises: what is a defect of the last time."""
        if time.monotonic() - self._since < _WRITE_SECONDS:
            return
        if self._last is not None:
            if not self._last.done():
                return
            self._last.result()
        self._since = time.monotonic()
        self._last = self._pool.submit(self._write, machine, dict(outcomes))

    def _write(self, machine: Mapping[str, Any] | None, outcomes: Mapping[str, Outcome]) -> None:
        try:
            self._collector.write(self._collector.collect(machine, outcomes))
        except (MachineError, UserError, OSError) as error:  # the next time, or the end, does it
            self._say("", f"comparison.json: not written now: {explain(error)}")


def _cluster() -> dict[str, Any]:
    """What the runs are made on."""
    there = machines()
    prefix = "accelerator_type:"
    kinds = sorted({name.removeprefix(prefix) for node in there.nodes for name in node if name.startswith(prefix)})
    gpus = there.total("GPU")
    return {
        "device": " and ".join(kinds) if gpus and kinds else "GPU" if gpus else _cpu(),
        "gpus": gpus,
        "cpus": there.total("CPU"),
        "nodes": sum(1 for node in there.nodes if node.get("CPU") or node.get("GPU")),  # not a head that only leads
        "when": utc_now(),
    }


def _cpu() -> str:
    """This machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
