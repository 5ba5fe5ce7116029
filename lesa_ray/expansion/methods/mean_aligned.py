"""Mean of the matched neighbours: the upper one is moved to the lower, function-preserving, and the two are averaged.

On a real encoder this came closest of all starts to the true layer that was taken out (cosine 0.28 after matching, a
copy of a neighbour 0.25, random weights of its covariance 0.17). It is OpT-DeUS' idea (arXiv 2508.08011) with maps that
keep the function: permutations and rotations that all tensors of a block share, in place of a transport plan for each
(`lesa_ray.lesa.alignment`). One slot is one unit. The new layer is in its lower neighbour's own order. The means of
vectors are made here too, since biases on the private side are moved along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.blocks import Block
from lesa_ray.errors import UserError
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.alignments import alignment_flops, alignment_memory, blocks_of, private_vectors
from lesa_ray.expansion.methods.slots import slot_units

if TYPE_CHECKING:
    from lesa_ray.lesa.symmetry import Map


class MeanAligned(Method):
    name = "mean-aligned"
    title = "the mean of matched neighbours"
    position = "top"
    zero_init = False
    vectors = "mean"
    draws = False
    pads = False
    averages_vectors = True

    def units(self, job: Job) -> list[Unit]:
        blocks = blocks_of(job)
        if (private := private_vectors(blocks)) and job.vectors == "first":
            raise UserError(
                f"--vectors first: {private[0]} belongs to neurons or heads, whose order is not layer 0's in a new "
                "layer; use lower or mean"
            )
        types = (*job.anatomy.matrices, *(job.anatomy.vectors if job.vectors == "mean" else ()))
        in_layer = sum(t.d1 * t.d2 for t in job.anatomy.matrices)
        return slot_units(
            job,
            tuple(t for t in job.anatomy.types.values() if t in types),
            flops_per_element=alignment_flops(job.anatomy, blocks) / in_layer,
            tensors_in_memory=4,
            extra_bytes=alignment_memory(job, blocks),
        )

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.lesa.alignment import align
        from lesa_ray.lesa.streams import working_dtype

        slot = next(slot for slot in job.plan.slots if slot.id == unit.makes[0][0])
        upper = slot.upper
        assert upper is not None, "a mean lies between two"
        blocks = blocks_of(job)
        maps: dict[int, Map] = {}

        def map_of(at: int, block: Block) -> Map:
            if at not in maps:
                target, moving = ({n: tensors.read(i, n) for n in block.matrices} for i in (slot.lower, upper))
                maps[at] = align(target, moving, block, device=context.device)
            return maps[at]

        for done, (slot_id, name) in enumerate(unit.makes):
            if context.progress:
                context.progress("matching and averaging", done / len(unit.makes))
            below, above = (tensors.read(i, name) for i in (slot.lower, upper))
            for at, block in enumerate(blocks):
                if name in block.parts:
                    above = map_of(at, block).moved(block.parts[name], above)
            wide = working_dtype(below.dtype)
            tensors.write(slot_id, name, (below.to(wide) + above.to(wide)) / 2)
        return {}
