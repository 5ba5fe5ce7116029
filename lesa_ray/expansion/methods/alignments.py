"""Units that match each layer of the base to the layer below it, for the methods that compare layers number by number.

A unit reads two neighbouring layers and keeps the map that moves the upper to the lower (`lesa_ray.lesa.alignment`), a
few numbers a neuron and two small matrices a group of heads. The matching of raw neighbours is all that is needed: maps
follow one another, so later units put together the map of any layer to the coordinates of layer 0. All units can run
at once, none holds more than two layers, and what they find does not depend on how many run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lesa_ray.budget import require_budget
from lesa_ray.checkpoint.anatomy import Anatomy
from lesa_ray.checkpoint.blocks import Attention, Block, Mlp, parts_in, read_blocks
from lesa_ray.checkpoint.header import FLOAT_BYTES
from lesa_ray.expansion.method import Job, Kept, RunContext, Tensors, Unit
from lesa_ray.lesa.bounds import EXACT

if TYPE_CHECKING:
    from lesa_ray.lesa.symmetry import Map

Blocks = tuple[Attention, Mlp]


def blocks_of(job: Job) -> Blocks:
    """The blocks of the base's layers. Raises: UserError if they cannot be matched."""
    return read_blocks(job.anatomy, job.method.name, "; use another method")


def alignment_units(job: Job, blocks: Blocks) -> list[Unit]:
    """One unit for each layer but the first."""
    attention, mlp = blocks
    reads = 2 * sum(_layer_bytes(job.anatomy, block) for block in blocks)
    return [
        Unit(
            name=alignment_name(layer),
            makes=(),
            flops=alignment_flops(job.anatomy, blocks),
            memory=alignment_memory(job, blocks),
            keeps=(
                Kept(_name(layer, "heads"), (attention.heads,)),
                Kept(_name(layer, "turns"), (2, attention.groups, attention.size, attention.size)),
                Kept(_name(layer, "neurons"), (2, mlp.neurons)),
            ),
            reads=reads,
        )
        for _, layer in pairwise(range(job.anatomy.layers))
    ]


def alignment_name(layer: int) -> str:
    """The name of the unit that matches a layer to the one below."""
    return f"alignment-{layer}"


def alignment_flops(anatomy: Anatomy, blocks: Blocks) -> float:
    """Of the products of two layers' neurons and heads."""
    attention, mlp = blocks
    width = anatomy.types[next(mlp.named("down"))].d1
    projections = sum(len(parts_in(mlp.parts[name])) for name in mlp.matrices)
    return 2.0 * projections * mlp.neurons**2 * width + 4.0 * (attention.heads * attention.size) ** 2 * width


def alignment_memory(job: Job, blocks: Blocks) -> int:
    """Peak bytes of matching two layers. Raises: RoomError if a budget that was given is smaller."""
    attention, mlp = blocks
    sizes = [2 * (_layer_bytes(job.anatomy, block) + 4 * _elements(job.anatomy, block)) for block in blocks]
    assigned = 20 * min(mlp.neurons, EXACT) ** 2  # its costs in float32, and twice in float64
    needed = max(sizes[0] + 24 * (attention.heads * attention.size) ** 2, sizes[1] + 6 * mlp.neurons**2 + assigned)
    require_budget(
        job.config.memory_budget, needed, f"{job.method.name}, to match two layers,", "or take another method"
    )
    return needed


def run_alignment(unit: Unit, blocks: Blocks, tensors: Tensors, context: RunContext) -> dict[str, Any]:
    """Match a layer to the one below, and keep the map. Reports the cosine of the two before and after."""
    from lesa_ray.lesa.alignment import align, move
    from lesa_ray.lesa.matched import likeness

    layer = int(unit.name.rpartition("-")[2])
    report: dict[str, Any] = {"layer": layer, "onto": layer - 1}
    for done, (what, block) in enumerate(zip(("attention", "mlp"), blocks, strict=True)):
        if context.progress:
            context.progress(f"matching {what}", done / 2)
        target, moving = ({n: tensors.read(i, n) for n in block.matrices} for i in (layer - 1, layer))
        found = align(target, moving, block, device=context.device)
        _keep(tensors, layer, found)
        report[what] = {
            "cosine_as_it_is": likeness(moving, target, block.matrices).cosine,
            "cosine_matched": likeness(move(moving, block, found), target, block.matrices).cosine,
        }
    return report


def maps_to_first(block: Block, layers: int, tensors: Tensors) -> list[Map]:
    """For each layer the map to the coordinates of layer 0, from what the units kept."""
    from lesa_ray.lesa.symmetry import chained

    return chained(block, [_kept(block, layer, tensors) for layer in range(1, layers)])


def private_vectors(blocks: Blocks) -> list[str]:
    """The biases that belong to neurons or heads."""
    return [name for block in blocks for name in block.parts if name not in block.matrices]


def _name(layer: int, what: str) -> str:
    return f"alignment.{layer}.{what}"


def _keep(tensors: Tensors, layer: int, found: Map) -> None:
    import torch

    from lesa_ray.lesa.symmetry import NeuronMap

    if isinstance(found, NeuronMap):
        tensors.keep(_name(layer, "neurons"), torch.stack([found.order, found.signs]).double())
        return
    tensors.keep(_name(layer, "heads"), found.order.double())
    tensors.keep(_name(layer, "turns"), torch.stack([found.query, found.value]))


def _kept(block: Block, layer: int, tensors: Tensors) -> Map:
    from lesa_ray.lesa.symmetry import HeadMap, NeuronMap

    if isinstance(block, Mlp):
        order, signs = tensors.kept(_name(layer, "neurons")).long()
        return NeuronMap(order, signs)
    query, value = tensors.kept(_name(layer, "turns"))
    return HeadMap(tensors.kept(_name(layer, "heads")).long(), query, value)


def _layer_bytes(anatomy: Anatomy, block: Block) -> int:
    return sum(t.d1 * t.d2 * FLOAT_BYTES[t.dtype] for t in map(anatomy.types.__getitem__, block.matrices))


def _elements(anatomy: Anatomy, block: Block) -> int:
    return sum(t.d1 * t.d2 for t in map(anatomy.types.__getitem__, block.matrices))
