"""LESA: layers predicted between their neighbours (arXiv 2502.13794; github.com/yangyifei729/LESA).

One weight type is one unit: its matrices in all layers are needed for the common basis and to train that type's
predictor (`lesa_ray.lesa.fit`). Types whose new tensors would all be zero are not computed at all.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit

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
                flops, memory = _cost(weight_type, job)
                units.append(Unit(name=weight_type.name, makes=makes, flops=flops, memory=memory))
        return units

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.lesa.fit import fit_weight_type
        from lesa_ray.lesa.ridge import require_ridge

        weight_type = unit.makes[0][1]
        if job.config.lesa.predictor == "ridge":  # before the layers are read
            require_ridge(weight_type, job.anatomy.types[weight_type].d2, context.device)
        wanted = {slot_id for slot_id, _ in unit.makes}

        def store(slot: int, tensor: torch.Tensor) -> None:
            if slot in wanted:
                tensors.write(slot, weight_type, tensor)

        report = fit_weight_type(
            lambda layer: tensors.read(layer, weight_type),
            job.anatomy.layers,
            [(slot.id, slot.lower, slot.upper) for slot in job.plan.slots if slot.upper is not None],
            store,
            job.config.lesa,
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


def _seed(seed: int, weight_type: str) -> int:
    """A seed for each weight type, so that types of one shape do not share their random numbers."""
    return (seed * 1_000_003 + zlib.crc32(weight_type.encode())) % 2**31


def _cost(weight_type: WeightType, job: Job) -> tuple[float, int]:
    """(floating-point operations, peak bytes) of a unit: Gram matrix, eigenvectors, coefficients, predictor steps."""
    settings, layers = job.config.lesa, job.anatomy.layers * (1 + len(job.config.variants))
    d1, d2 = weight_type.d1, weight_type.d2
    rank = min(d1, settings.rank or d1)
    gram = 2.0 * layers * d1 * d1 * d2 + 10.0 * d1**3
    coefficients = 2.0 * layers * rank * d1 * d2
    weights = settings.hidden * (3 * d2 + settings.hidden)
    training = 6.0 * settings.epochs * rank * max(layers - 2, 1) * weights
    memory = 4 * layers * rank * d2 + 4 * 8 * d1 * d1 + 3 * 4 * d1 * d2
    return gram + coefficients + training, memory
