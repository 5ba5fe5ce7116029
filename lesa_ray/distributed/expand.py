"""`lesa_ray.expand`: the main job from start to end.

    open the base ▸ plan ▸ (rehearse, where the function is to be kept) ▸ units ▸ shards ▸ manifest, card, config.json

This is the same on a laptop and on a cluster; what differs is the runner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from lesa_ray.checkpoint.manifest import Manifest, read_manifest
from lesa_ray.checkpoint.mark import LEASE_DIR
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.config import ExpandConfig
from lesa_ray.distributed.address import check_address, named_ray
from lesa_ray.distributed.tenancy import Tenant, remove_if_mine, tenancy
from lesa_ray.errors import RoomError, UnsharedError, UserError
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.out import (
    abandon,
    check_out,
    check_room,
    claim,
    finish,
    make_manifest,
    missing_shards,
    out_state,
    take_up,
)
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.rehearsal import check_function
from lesa_ray.expansion.runner import InlineRunner, Listener, Runner, Silent, weight_of
from lesa_ray.expansion.workbench import finished_record
from lesa_ray.faults import going_on, is_fault, reaching
from lesa_ray.report.model_card import model_card


@dataclass(frozen=True)
class Expanded:
    """What an expansion gave. `seconds` and `peak_memory` are of this run; a reused result took next to nothing."""

    out: str
    layers: int
    parameters: int
    seconds: float
    peak_memory: int
    """Largest resident set in bytes of any process that worked."""
    reused: bool
    """OUT was complete already."""
    resumed: bool
    """An interrupted run was taken up."""
    manifest: Manifest


def expand(
    config: ExpandConfig,
    runner: Runner | None = None,
    listener: Listener | None = None,
    *,
    tenant: Tenant | None = None,
) -> Expanded:
    """Grow a checkpoint deeper.

    runner: who does the work; by default Ray, or this process where there is nothing to compute. tenant: who may work
    at OUT, if the caller has seen to it; by default this call does. Raises: UserError for wrong input, with nothing
    left behind; MachineError for a fault, after which the same call goes on."""
    listener = listener or Silent()
    begin = time.monotonic()
    if runner is None:
        check_address()
    check_out(config.base, config.out)
    listener.phase("reading the headers of the base", 0)
    expansion = prepare(config)
    if expansion.chosen is not None:
        listener.phase(f"auto: {expansion.job.method.name}, since {expansion.chosen}", 0)
    if (widths := expansion.job.widths) is not None and widths.note is not None:
        listener.phase(widths.note, 0)
    state = out_state(expansion)
    if state == "done":
        return _reused(expansion, begin)
    with reaching(f"OUT {config.out}", "cannot be written"):
        if state == "fresh":
            check_room(expansion)
    with tenancy(config.out, LEASE_DIR, listener, tenant) as tenant:
        state = out_state(expansion)  # as whoever was at work there until now left it
        if state == "done":
            return _reused(expansion, begin)
        with reaching(f"OUT {config.out}", "cannot be written"):
            (claim if state == "fresh" else take_up)(expansion)
        return _work(expansion, runner, listener, tenant, begin, resumed=state == "resume")


def _work(
    expansion: Expansion, runner: Runner | None, listener: Listener, tenant: Tenant, begin: float, *, resumed: bool
) -> Expanded:
    """From OUT that is this expansion's to the checkpoint there."""
    config, storage = expansion.job.config, Storage(expansion.job.config.out)
    try:
        with _rehearsing(expansion) as rehearsal:
            records = {u.name: r for u in expansion.units if (r := finished_record(expansion.job, u, config.out))}
            units = [unit for unit in expansion.units if unit.name not in records]
            if units:
                if expansion.job.zero_init:
                    listener.phase("trying on a miniature that the function is kept", 0)
                rehearsal()  # before work that may take hours
            runner = runner or _default_runner(bool(units), storage, listener)
            if units:
                job = expansion.job
                listener.phase(f"{job.method.name}: making {len(job.plan.slots)} layers", sum(map(weight_of, units)))
                records.update(runner.run_units(expansion, units, listener))
            shards = missing_shards(expansion)
            listener.phase("writing the checkpoint", sum(shard.nbytes for shard in shards))
            runner.write_shards(expansion, shards, listener)
            rehearsal()  # a copy of bytes takes no longer than the miniature, so it did not wait for it
            expansion.check_unchanged()
            manifest = make_manifest(expansion, {name: record["report"] for name, record in records.items()})
            finish(expansion, manifest, model_card(expansion, manifest))
    except (RoomError, UnsharedError):
        if not any(finished_record(expansion.job, unit, config.out) for unit in expansion.units):
            remove_if_mine(tenant, partial(abandon, expansion))
        raise
    except UserError:
        remove_if_mine(tenant, partial(abandon, expansion))
        raise
    except Exception as error:
        if is_fault(error):
            raise going_on(f"OUT {config.out}", error) from error
        raise
    return _expanded(expansion, manifest, begin, runner, resumed=resumed)


@contextmanager
def _rehearsing(expansion: Expansion) -> Iterator[Callable[[], None]]:
    """`check_function` beside what is done within; calling what is yielded waits for its verdict. The end waits, too:
    transformers patches itself while a model is made, so a thread that is still at it when the caller loads a model
    would leave him one whose weights are not tied."""
    with ThreadPoolExecutor(1, "rehearsal") as pool:
        yield pool.submit(check_function, expansion).result


def _default_runner(computes: bool, out: Storage, listener: Listener) -> Runner:
    if not computes and (out.is_local or named_ray() in (None, "local")):
        return InlineRunner()  # one disk is no faster for many tasks, and starting Ray takes longer than the copy
    try:
        from lesa_ray.distributed.ray_runner import RayRunner
    except ImportError:
        import torch

        return InlineRunner("cuda" if torch.cuda.is_available() else "cpu")
    listener.phase("starting Ray", 0)
    return RayRunner()


def _reused(expansion: Expansion, begin: float) -> Expanded:
    """What a run that was finished before gives."""
    storage = Storage(expansion.job.config.out)
    manifest = read_manifest(storage)
    assert manifest is not None
    storage.remove_tree(WORK_DIR)
    return _expanded(expansion, manifest, begin, InlineRunner(), reused=True)


def _expanded(
    expansion: Expansion,
    manifest: Manifest,
    begin: float,
    runner: Runner,
    *,
    reused: bool = False,
    resumed: bool = False,
) -> Expanded:
    return Expanded(
        out=expansion.job.config.out,
        layers=expansion.job.whole_plan.layers,
        parameters=expansion.parameters,
        seconds=time.monotonic() - begin,
        peak_memory=runner.peak_memory(),
        reused=reused,
        resumed=resumed,
        manifest=manifest,
    )
