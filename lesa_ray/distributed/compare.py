"""`lesa-ray compare`: a comparison's stages on Ray, its `comparison.json` brought up to date as runs end."""

from __future__ import annotations

import time
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
    written = time.monotonic()

    def settled(outcome: Outcome) -> None:
        nonlocal machine, written
        known[outcome.id] = outcome
        if outcome.how == "made":
            machine = _cluster()
        if time.monotonic() - written < _WRITE_SECONDS:
            return
        written = time.monotonic()
        try:
            collector.write(collector.collect(machine, known))
        except (MachineError, UserError, OSError) as error:  # the next time, or the end, does it
            say("", f"comparison.json: not written now: {explain(error)}")

    with reaching(f"store {config.store}"):
        displaced = collector.displaced()
    for note in (*comparison.notes, *([displaced] if displaced else [])):
        say("", note)
    outcomes = run_fleet(config, comparison.stages, say, settled)
    content = collector.collect(machine, known)
    say("", f"written: {collector.write(content)}; `lesa-ray report {collector.storage.url}` draws it")
    return content, outcomes


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
        "nodes": len(there.nodes),
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
