"""Random layers with zero output projections: the control that any start has to beat.

The function is kept as in LLaMA Pro (arXiv 2401.02415), but nothing of the base is in the new layers except how large
their weights are: each matrix is normal with mean zero and the mean of its two neighbours' standard deviations, norms
and biases are the lower neighbour's. On a toy such layers trained as well as any published start. One slot is one unit;
each tensor has a seed of its own, so that the same seed gives the same bytes in any order of work.
"""

from __future__ import annotations

import math
from typing import Any

from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.slots import slot_units


class RandomLayers(Method):
    name = "random"
    title = "random weights (a control)"
    position = "top"
    zero_init = True
    vectors = "lower"

    def units(self, job: Job) -> list[Unit]:
        return slot_units(job, job.anatomy.matrices, flops_per_element=20, tensors_in_memory=3)

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        import torch

        from lesa_ray.lesa.streams import generator_for

        slots = {slot.id: slot for slot in job.plan.slots}
        for done, (slot_id, name) in enumerate(unit.makes):
            slot = slots[slot_id]
            layers = [layer for layer in (slot.lower, slot.upper) if layer is not None]
            near = [tensors.read(layer, name).float() for layer in layers]
            size = sum(
                float(weight.std(correction=0)) / math.sqrt(job.share(layer, name))
                for layer, weight in zip(layers, near, strict=True)
            ) / len(near)
            noise = torch.randn(near[0].shape, generator=generator_for(job.config.seed, "random", slot_id, name))
            tensors.write(slot_id, name, noise.mul_(size))
            if context.progress:
                context.progress("drawing", (done + 1) / len(unit.makes))
        return {}
