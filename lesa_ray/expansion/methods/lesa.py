"""LESA: layers predicted between their neighbours (arXiv 2502.13794; github.com/yangyifei729/LESA).

One weight type is one unit: its matrices in all layers are needed for the common basis and to train that type's
predictor (`lesa_ray.lesa.fit`). Types whose new tensors would all be zero are not computed at all.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.checkpoint.reader import FLOAT_BYTES
from lesa_ray.config import SvdRoute
from lesa_ray.expansion.lesa_task import lesa_task
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.lesa.cost import choose_route, require_budget, unit_cost

if TYPE_CHECKING:
    import torch


class Lesa(Method):
    name = "lesa"
    title = "LESA"
    paper = "https://arxiv.org/abs/2502.13794"
    position = "top"
    zero_init = False
    vectors = "lower"
    minimum_layers = 3

    def units(self, job: Job) -> list[Unit]:
        units = []
        for weight_type in job.anatomy.matrices:
            makes = job.makes(job.plan.slots, (weight_type,))
            if makes:
                cost = unit_cost(lesa_task(job, [weight_type], memory_budget=job.config.memory_budget))
                units.append(Unit(name=weight_type.name, makes=makes, flops=cost.flops, memory=cost.host_memory))
        return units

    def choices(self, job: Job) -> dict[str, str]:
        return {weight_type.name: _route(job, weight_type) for weight_type in job.anatomy.matrices}

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.lesa.fit import fit_weight_type
        from lesa_ray.lesa.ridge import require_ridge

        weight_type = unit.makes[0][1]
        if job.config.lesa.predictor == "ridge":  # before the layers are read
            require_ridge(weight_type, job.anatomy.types[weight_type].d2, context.device)
        require_budget(
            lesa_task(
                job, [job.anatomy.types[weight_type]], device=context.device, memory_budget=job.config.memory_budget
            ),
            weight_type,
        )
        wanted = {slot_id for slot_id, _ in unit.makes}

        def store(slot: int, tensor: torch.Tensor) -> None:
            if slot in wanted:
                tensors.write(slot, weight_type, tensor)

        report = fit_weight_type(
            lambda layer: tensors.read(layer, weight_type),
            job.anatomy.layers,
            [(slot.id, slot.lower, slot.upper) for slot in job.plan.slots if slot.upper is not None],
            store,
            job.config.lesa.model_copy(update={"svd": _route(job, job.anatomy.types[weight_type])}),
            seed=_seed(job.config.seed, weight_type),
            device=context.device,
            variants=[
                functools.partial(tensors.read, weight_type=weight_type, variant=variant)
                for variant in range(len(job.config.variants))
            ],
            scratch_dir=context.scratch_dir,
            memory_budget=context.memory_budget,
            progress=context.progress,
        )
        return report.to_dict()


def _route(job: Job, weight_type: WeightType) -> SvdRoute:
    """The spectral route, by the settings alone, so that it is the same wherever the unit runs."""
    settings = job.config.lesa
    if settings.svd != "auto":
        return settings.svd
    return choose_route(
        weight_type.d1,
        weight_type.d2,
        job.anatomy.layers,
        settings.rank,
        element_bytes=FLOAT_BYTES[weight_type.dtype],
        oversampling=settings.oversampling,
        power_iterations=settings.power_iterations,
        memory_budget=job.config.memory_budget,
    )


def _seed(seed: int, weight_type: str) -> int:
    """A seed for each weight type, so that types of one shape do not share their random numbers."""
    return (seed * 1_000_003 + zlib.crc32(weight_type.encode())) % 2**31
