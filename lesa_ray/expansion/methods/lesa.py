"""LESA: layers predicted between their neighbours (arXiv 2502.13794; github.com/yangyifei729/LESA).

One weight type is one unit: its matrices in all layers are needed for the common basis and to train that type's
predictor (`lesa_ray.lesa.fit`). Experts of a kind are weight types of one shape: with `share_experts` all of them are
one unit with one predictor, otherwise some of them are one unit, each with its own predictor, and a GPU trains those
side by side. Types whose new tensors would all be zero are not computed at all.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.errors import UserError
from lesa_ray.expansion.lesa_task import check_budget, lesa_route, lesa_task, require_room
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.lesa.cost import stack_size, unit_cost

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
    predicts = True

    def units(self, job: Job) -> list[Unit]:
        units = []
        for name, types in _together(job).items():
            makes = tuple(made for fit in _fits(job, types) for made in job.makes(job.plan.slots, fit))
            if makes:
                check_budget(job, types, name)
                cost = unit_cost(lesa_task(job, types, memory_budget=job.config.memory_budget))
                units.append(Unit(name=name, makes=makes, flops=cost.flops, memory=cost.host_memory))
        return units

    def choices(self, job: Job) -> dict[str, str]:
        return {weight_type.name: lesa_route(job, types) for types in _together(job).values() for weight_type in types}

    def fitted(self, job: Job, unit: Unit) -> tuple[WeightType, ...]:
        return _together(job).get(unit.name, ())

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.lesa.fit import Fit, fit_each

        types = _together(job)[unit.name]
        require_room(job, types, context, unit.name)
        wanted = set(unit.makes)

        def fit(name: str, members: Sequence[WeightType]) -> Fit:
            def store(member: int, slot: int, tensor: torch.Tensor) -> None:
                if (slot, members[member].name) in wanted:
                    tensors.write(slot, members[member].name, tensor)

            return Fit(
                [functools.partial(tensors.read, weight_type=weight_type.name) for weight_type in members],
                store,
                _seed(job.config.seed, name),
                [
                    functools.partial(tensors.read, weight_type=weight_type.name, variant=variant)
                    for variant in range(len(job.config.variants))
                    for weight_type in members
                ],
            )

        fits = _fits(job, types)
        names = [unit.name] if len(fits) == 1 else [weight_type.name for weight_type in types]
        reports = fit_each(
            [fit(name, members) for name, members in zip(names, fits, strict=True)],
            job.anatomy.layers,
            [(slot.id, slot.lower, slot.upper) for slot in job.plan.slots if slot.upper is not None],
            job.config.lesa.model_copy(update={"svd": lesa_route(job, types)}),
            device=context.device,
            device_memory=context.device_memory,
            scratch_dir=context.scratch_dir,
            memory_budget=context.memory_budget,
            progress=context.progress,
        )
        fitted = {name: report.to_dict() for name, report in zip(names, reports, strict=True)}
        return fitted[unit.name] if len(fits) == 1 else {"fits": fitted}


def _together(job: Job) -> dict[str, tuple[WeightType, ...]]:
    """The weight types of each unit, by its name: one, or experts of a kind, all of one shape."""
    sharing = job.config.lesa.share_experts
    if sharing and not any(weight_type.is_expert for weight_type in job.anatomy.matrices):
        raise UserError(f"--share-experts: BASE {job.config.base} ({job.anatomy.family}) has no experts; leave it out")
    units: dict[str, tuple[WeightType, ...]] = {}
    for kind, types in job.anatomy.kinds.items():
        if sharing and len({_shape(weight_type) for weight_type in types}) > 1:
            raise UserError(f"--share-experts: BASE {job.config.base}: {kind} are not of one shape and element type")
        units |= {kind: types} if sharing else _side_by_side(job, kind, types)
    return units


def _side_by_side(job: Job, kind: str, types: Sequence[WeightType]) -> dict[str, tuple[WeightType, ...]]:
    """Experts of a kind in units of about as many, as large as `stack_size` says."""
    units = {}
    for shape in dict.fromkeys(map(_shape, types)):
        alike = sorted((t for t in types if _shape(t) == shape), key=lambda t: t.expert or 0)
        most = stack_size(lesa_task(job, alike, memory_budget=job.config.memory_budget))
        if job.config.gpus_per_task == 0:  # CPUs gain nothing by it, and more units keep more cores busy
            most = 1
        parts = math.ceil(len(alike) / most)
        for part in range(parts):
            some = tuple(alike[part * len(alike) // parts : (part + 1) * len(alike) // parts])
            several = kind.replace("*", f"{some[0].expert}-{some[-1].expert}")
            units[some[0].name if len(some) == 1 else several] = some
    return units


def _fits(job: Job, types: tuple[WeightType, ...]) -> list[tuple[WeightType, ...]]:
    """What of a unit has a basis and a predictor of its own."""
    return [types] if job.config.lesa.share_experts else [(weight_type,) for weight_type in types]


def _shape(weight_type: WeightType) -> tuple[object, ...]:
    return weight_type.shape, weight_type.dtype, weight_type.transposed


def _seed(seed: int, weight_type: str) -> int:
    """A seed for each weight type, so that types of one shape do not share their random numbers."""
    return (seed * 1_000_003 + zlib.crc32(weight_type.encode())) % 2**31
