"""LESA: layers predicted between their neighbours (arXiv 2502.13794; github.com/yangyifei729/LESA).

One weight type is one unit: its matrices in all layers are needed for the common basis and to train that type's
predictor (`lesa_ray.lesa.fit`); with `share_experts` all experts of a kind are one. Types whose new tensors would all
be zero are not computed at all.
"""

from __future__ import annotations

import functools
import re
import zlib
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.errors import UserError
from lesa_ray.expansion.lesa_task import lesa_route, lesa_task
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.lesa.cost import require_budget, unit_cost

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(r"experts\.\d+\.")


class Lesa(Method):
    name = "lesa"
    title = "LESA"
    paper = "https://arxiv.org/abs/2502.13794"
    position = "top"
    zero_init = False
    vectors = "lower"
    minimum_layers = 3
    predicts = True

    def units(self, job: Job) -> list[Unit]:
        units = []
        for name, types in _together(job).items():
            makes = job.makes(job.plan.slots, types)
            if makes:
                cost = unit_cost(lesa_task(job, types, memory_budget=job.config.memory_budget))
                units.append(Unit(name=name, makes=makes, flops=cost.flops, memory=cost.host_memory))
        return units

    def choices(self, job: Job) -> dict[str, str]:
        return {weight_type.name: lesa_route(job, types) for types in _together(job).values() for weight_type in types}

    def fitted(self, job: Job, unit: Unit) -> tuple[WeightType, ...]:
        return _together(job).get(unit.name, ())

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.lesa.fit import fit_together
        from lesa_ray.lesa.ridge import require_ridge

        types = _together(job)[unit.name]
        if job.config.lesa.predictor == "ridge":  # before the layers are read
            require_ridge(unit.name, types[0].d2, context.device)
        require_budget(lesa_task(job, types, device=context.device, memory_budget=job.config.memory_budget), unit.name)
        wanted = set(unit.makes)

        def store(member: int, slot: int, tensor: torch.Tensor) -> None:
            if (slot, types[member].name) in wanted:
                tensors.write(slot, types[member].name, tensor)

        report = fit_together(
            [functools.partial(tensors.read, weight_type=weight_type.name) for weight_type in types],
            job.anatomy.layers,
            [(slot.id, slot.lower, slot.upper) for slot in job.plan.slots if slot.upper is not None],
            store,
            job.config.lesa.model_copy(update={"svd": lesa_route(job, types)}),
            seed=_seed(job.config.seed, unit.name),
            device=context.device,
            variants=[
                functools.partial(tensors.read, weight_type=weight_type.name, variant=variant)
                for variant in range(len(job.config.variants))
                for weight_type in types
            ],
            scratch_dir=context.scratch_dir,
            memory_budget=context.memory_budget,
            progress=context.progress,
        )
        return report.to_dict()


def _together(job: Job) -> dict[str, tuple[WeightType, ...]]:
    """The weight types of each unit, by its name: one, or the experts of a kind (`share_experts`), all of one shape."""
    if not job.config.lesa.share_experts:
        return {weight_type.name: (weight_type,) for weight_type in job.anatomy.matrices}
    if not any(weight_type.is_expert for weight_type in job.anatomy.matrices):
        raise UserError(f"--share-experts: BASE {job.config.base} ({job.anatomy.family}) has no experts; leave it out")
    kinds: dict[str, tuple[WeightType, ...]] = {}
    for weight_type in job.anatomy.matrices:
        kind = _EXPERT.sub("experts.*.", weight_type.name) if weight_type.is_expert else weight_type.name
        kinds[kind] = (*kinds.get(kind, ()), weight_type)
    for kind, types in kinds.items():
        if len({(t.shape, t.dtype, t.transposed) for t in types}) > 1:
            raise UserError(f"--share-experts: BASE {job.config.base}: {kind} are not of one shape and element type")
    return kinds


def _seed(seed: int, weight_type: str) -> int:
    """A seed for each weight type, so that types of one shape do not share their random numbers."""
    return (seed * 1_000_003 + zlib.crc32(weight_type.encode())) % 2**31
