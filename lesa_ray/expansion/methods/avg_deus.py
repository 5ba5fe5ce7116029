"""Avg-DeUS: every tensor of a new layer is the mean of its two neighbours' (arXiv 2508.08011, section 4.1;
github.com/voalmciaf/OpT-DeUS, Model/Average.py). One slot is one unit; a tensor pair is in memory at a time.
"""

from __future__ import annotations

from typing import Any

from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.slots import slot_units


class AvgDeus(Method):
    name = "avg-deus"
    title = "Avg-DeUS"
    paper = "https://arxiv.org/abs/2508.08011"
    position = "top"
    zero_init = False
    vectors = "mean"
    draws = False

    def units(self, job: Job) -> list[Unit]:
        return slot_units(job, job.anatomy.matrices, flops_per_element=2, tensors_in_memory=4)

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        slots = {slot.id: slot for slot in job.plan.slots}
        for done, (slot_id, weight_type) in enumerate(unit.makes):
            slot = slots[slot_id]
            lower = tensors.read(slot.lower, weight_type).float()
            upper = lower if slot.upper is None else tensors.read(slot.upper, weight_type).float()
            tensors.write(slot_id, weight_type, (lower + upper) / 2)
            if context.progress:
                context.progress("averaging", (done + 1) / len(unit.makes))
        return {}
