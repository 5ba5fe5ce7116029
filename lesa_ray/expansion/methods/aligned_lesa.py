"""Aligned LESA: LESA (arXiv 2502.13794) on layers whose neurons and heads were brought into correspondence first.

As published, LESA compares entries of neighbouring layers that do not belong together: neurons and heads may lie in any
order in each layer, and for q, k, v, gate and up the basis is on that side. On a real encoder its held-out cosine was
0.00. What differs here, and nothing else:

- each layer is matched to the one below, function-preserving (`lesa_ray.lesa.alignment`); one unit a pair of layers;
- the basis lies on the residual side, which all layers share: o and down as they are, q, k, v, gate, up transposed, so
  that d1 is the model's width and d2 the number of neurons or head entries for every type (of all projections that a
  family keeps in one matrix);
- a new layer is written in its lower neighbour's own order, so that biases copied from there fit and old layers stay
  what they are, to the byte.

Everything else is LESA's: units by weight type, settings, report. The held-out figures of that report are those of
matched layers, and matching alone lifts them: `lesa-ray analyze` shows them beside chance.

Two differences in cost: d2 is the number of neurons for gate, up and down, so the predictor is wider (and ridge is
refused above 4,096 neurons on CPUs, 16,384 on GPUs); and attention is turned in float32, whatever the weights are.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.checkpoint.blocks import Attention, Block
from lesa_ray.errors import UserError
from lesa_ray.expansion.lesa_task import check_budget, lesa_route, lesa_task, require_room
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.alignments import (
    Blocks,
    alignment_name,
    alignment_units,
    blocks_of,
    maps_to_first,
    private_vectors,
    run_alignment,
)
from lesa_ray.lesa.cost import unit_cost

if TYPE_CHECKING:
    import torch


class AlignedLesa(Method):
    name = "aligned-lesa"
    title = "Aligned LESA"
    paper = "https://arxiv.org/abs/2502.13794"
    position = "top"
    zero_init = False
    vectors = "lower"
    minimum_layers = 3
    predicts = True
    pads = False

    def units(self, job: Job) -> list[Unit]:
        blocks = self._blocks(job)
        after = tuple(alignment_name(layer) for layer in range(1, job.anatomy.layers))
        fits = []
        for weight_type in job.anatomy.matrices:
            makes = job.makes(job.plan.slots, (weight_type,))
            if makes:
                viewed = _viewed(weight_type, blocks)
                check_budget(job, (viewed,), weight_type.name)
                cost = unit_cost(lesa_task(job, (viewed,), memory_budget=job.config.memory_budget))
                fits.append(Unit(weight_type.name, makes, cost.flops, cost.host_memory, after))
        return [*alignment_units(job, blocks), *fits]

    def choices(self, job: Job) -> dict[str, str]:
        blocks = self._blocks(job)
        return {t.name: lesa_route(job, (_viewed(t, blocks),)) for t in job.anatomy.matrices}

    def fitted(self, job: Job, unit: Unit) -> tuple[WeightType, ...]:
        weight_type = job.anatomy.types.get(unit.name)
        return () if weight_type is None else (_viewed(weight_type, self._blocks(job)),)

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        blocks = self._blocks(job)
        if unit.keeps:
            return run_alignment(unit, blocks, tensors, context)
        from lesa_ray.lesa.fit import fit_weight_type
        from lesa_ray.lesa.streams import seed_for
        from lesa_ray.lesa.symmetry import rows_first

        weight_type = job.anatomy.types[unit.name]
        viewed = _viewed(weight_type, blocks)
        require_room(job, (viewed,), context, unit.name)
        block = _block_of(weight_type, blocks)
        part, maps = block.parts[weight_type.name], maps_to_first(block, job.anatomy.layers, tensors)
        wanted = {slot for slot, _ in unit.makes}

        def load(layer: int, variant: int | None = None) -> torch.Tensor:
            """(width, private side) in the coordinates of layer 0. A fine-tune's are those of its base."""
            tensor = maps[layer].moved(part, tensors.read(layer, weight_type.name, variant))
            return rows_first(part, tensor).T.contiguous()

        def store(slot: int, tensor: torch.Tensor) -> None:
            if slot in wanted:
                tensor = tensor if part in ("o", "down") else tensor.T
                mapping = maps[job.plan.origin(slot)]
                tensors.write(slot, weight_type.name, mapping.restored(part, tensor))

        report = fit_weight_type(
            load,
            job.anatomy.layers,
            [(slot.id, slot.lower, slot.upper) for slot in job.plan.slots if slot.upper is not None],
            store,
            job.config.lesa.model_copy(update={"svd": lesa_route(job, (viewed,))}),
            seed=seed_for(job.config.seed, self.name, unit.name),
            device=context.device,
            device_memory=context.device_memory,
            variants=[functools.partial(load, variant=variant) for variant in range(len(job.config.variants))],
            scratch_dir=context.scratch_dir,
            memory_budget=context.memory_budget,
            progress=context.progress,
        )
        return report.to_dict()

    def _blocks(self, job: Job) -> Blocks:
        """Raises: UserError for layers that cannot be matched, and settings that make no sense here."""
        blocks = blocks_of(job)
        if job.config.lesa.share_experts:
            raise UserError(
                f"--share-experts: BASE {job.config.base} ({job.anatomy.family}) has no experts; leave it out"
            )
        private = private_vectors(blocks)
        if private and job.vectors != "lower":
            raise UserError(
                f"--vectors {job.vectors}: {private[0]} belongs to neurons or heads, which {self.name} leaves in the "
                "lower neighbour's order; use lower"
            )
        return blocks


def _block_of(weight_type: WeightType, blocks: Blocks) -> Block:
    return next(block for block in blocks if weight_type.name in block.parts)


def _viewed(weight_type: WeightType, blocks: Blocks) -> WeightType:
    """A weight type as it is decomposed: the residual side as rows, attention in float32 at least."""
    block = _block_of(weight_type, blocks)
    if block.parts[weight_type.name] not in ("o", "down"):
        weight_type = replace(weight_type, transposed=not weight_type.transposed)
    turned = isinstance(block, Attention) and weight_type.dtype != "F64"
    return replace(weight_type, dtype="F32") if turned else weight_type
