"""The units that bring slots to their own width when the method has made them as wide as the widest layer.

The rule is in `lesa_ray.expansion.widths`. One slot is one unit; it starts when all tensors of the slot are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.expansion.method import Job, Tensors, Unit
from lesa_ray.expansion.plan import New
from lesa_ray.expansion.widths import PRIVATE, SIDES, Side, chosen, squares, taken


def resizing_units(job: Job, units: Sequence[Unit]) -> list[Unit]:
    """A unit for each slot whose width changes. units: all others."""
    made_by = {made: unit.name for unit in units for made in unit.makes}
    found = []
    for slot in job.plan.slots:
        makes = tuple((slot.id, t.name) for t in job.anatomy.types.values() if job.resizes(slot, t))
        if not makes:
            continue
        read = [t for side in SIDES for t in _ranking(job, slot, side)]
        largest = max(math.prod(shape) for t in read for shape in (t.shape, job.shape(slot, t)))
        found.append(
            Unit(
                name=f"width-{slot.id}",
                makes=makes,
                flops=2.0 * sum(math.prod(t.shape) for t in read),
                memory=4 * 4 * largest,
                after=tuple(dict.fromkeys(made_by[slot.id, t.name] for t in read if (slot.id, t.name) in made_by)),
                reads=2 * 4 * sum(math.prod(t.shape) for t in read),
                sized=True,
            )
        )
    return found


def run_resizing(unit: Unit, job: Job, tensors: Tensors) -> dict[str, Any]:
    """Cut or widen one slot's tensors; returns for each side what was kept, of how many, by which tensors' norms."""
    import torch

    from lesa_ray.lesa.streams import generator_for

    widths = job.widths
    assert widths is not None
    slot = job.slot(unit.makes[0][0])
    choices: dict[Side, list[list[int]]] = {}
    report: dict[str, Any] = {}
    for side in SIDES:
        ranking = _ranking(job, slot, side)
        if not ranking:
            continue
        groups, size = widths.groups(side), widths.size(side)
        norms = torch.zeros((), dtype=torch.float64)
        for t in ranking:
            norms = norms + squares(tensors.read(slot.id, t.name), PRIVATE[t.name][1], groups, size)
        wanted = widths.members(side, widths.of(slot.id))
        choice = choices[side] = chosen(norms, wanted)
        kept = [group * norms.shape[1] + at for group, row in enumerate(choice) for at in row if at >= 0]
        whole = float(norms.sum())
        report[side] = {
            "of": norms.numel(),
            "kept": _runs(kept),
            "added": groups * wanted - len(kept),
            "share_of_square_norm": float(norms.reshape(-1)[kept].sum()) / whole if whole else None,
            "ranked_by": [t.name for t in ranking],
        }
    for slot_id, name in unit.makes:
        side, axis = PRIVATE[name]
        noise = generator_for(job.config.seed, "width", slot_id, name) if axis == 0 else None
        members = widths.members(side, widths.widest)
        whole_tensor = tensors.read(slot_id, name)
        tensors.write(slot_id, name, taken(whole_tensor, axis, choices[side], members, widths.size(side), noise))
    return report


def _ranking(job: Job, slot: New, side: Side) -> list[WeightType]:
    """The tensors whose norms decide what of a side is kept; none where its width does not change."""
    return [
        t
        for t in job.anatomy.types.values()
        if job.widths is not None
        and job.widths.changes(slot.id, t.name)
        and PRIVATE[t.name][0] == side
        and job.is_there(slot, t)
    ]


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers in few characters: `0-5,7`."""
    found = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        found.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(found)
