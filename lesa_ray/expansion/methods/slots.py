"""Units of the methods that fill one slot at a time, and the means of vectors that any method may ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.expansion.method import Job, Tensors, Unit
from lesa_ray.expansion.plan import New

if TYPE_CHECKING:
    import torch

VECTORS_UNIT = "vectors"


def slot_units(
    job: Job,
    types: tuple[WeightType, ...],
    *,
    flops_per_element: float,
    tensors_in_memory: int,
    extra_bytes: int = 0,
    device_bytes: int = 0,
) -> list[Unit]:
    """One unit for each slot with something to make, ordered after the units of the slots it lies between.

    tensors_in_memory: as many as the largest, in float32, and `extra_bytes`; `device_bytes` of both go to a GPU."""
    units: list[Unit] = []
    named: set[int] = set()
    largest = max((math.prod(t.shape) for t in types), default=0)
    for slot in job.plan.slots:
        makes = job.makes((slot,), types)
        if not makes:
            continue
        elements = sum(math.prod(job.anatomy.types[name].shape) for _, name in makes)
        after = tuple(_unit_name(n) for n in (slot.lower, slot.upper) if n in named)
        named.add(slot.id)
        units.append(
            Unit(
                name=_unit_name(slot.id),
                makes=makes,
                flops=flops_per_element * elements,
                memory=4 * tensors_in_memory * largest + extra_bytes,
                after=after,
                device_memory=device_bytes,
            )
        )
    return units


def _unit_name(slot_id: int | None) -> str:
    return f"slot-{slot_id}"


def vectors_unit(job: Job) -> Unit | None:
    """The unit that averages the vectors of all slots, where the setting `vectors` is `mean`."""
    mean = job.vectors == "mean" and not job.method.averages_vectors
    makes = job.makes(job.plan.slots, job.anatomy.vectors) if mean else ()
    return Unit(name=VECTORS_UNIT, makes=makes, flops=0, memory=0) if makes else None


def run_vectors(unit: Unit, job: Job, tensors: Tensors) -> None:
    """Each vector of a slot is the mean of its neighbours'; above the last layer it is the lower one's."""
    slots: dict[int, New] = {slot.id: slot for slot in job.plan.slots}
    made: dict[tuple[int, str], torch.Tensor] = {}
    for slot_id, weight_type in unit.makes:
        slot = slots[slot_id]
        pair = [n for n in (slot.lower, slot.upper) if n is not None]
        values = [made[n, weight_type] if (n, weight_type) in made else tensors.read(n, weight_type) for n in pair]
        mean = sum((value.float() for value in values[1:]), start=values[0].float()) / len(values)
        made[slot_id, weight_type] = mean
        tensors.write(slot_id, weight_type, mean)
