"""OpT-DeUS: the lower neighbour, aligned to the upper by optimal transport, and their mean (arXiv 2508.08011;
github.com/voalmciaf/OpT-DeUS, Model/OT-DUS.py). Output projections are zero, so the function is kept.

One slot is one unit. The alignment of attention's output is needed for the feed-forward even though that tensor itself
ends up zero; the feed-forward's output is not aligned unless a later slot is made from it. The arithmetic is in
`lesa_ray.expansion.transport`; here the tensors of a layer get their roles, by their names.

The memory is in the plans: five matrices of n² doubles for n rows, 33 GB for 28,672, 113 GB for 53,248. A GPU that has
no room for them is left alone and the unit runs on its cores; a memory budget that was given is held against what
lies in host memory where the unit runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lesa_ray.budget import require_budget
from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.checkpoint.blocks import in_attention
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.errors import MachineError
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.slots import slot_units
from lesa_ray.gpu import DEVICE_SHARE, fits_device

if TYPE_CHECKING:
    import torch

    from lesa_ray.expansion.transport import Role

_NORMS_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm2", "ffn_norm")
"""The first of these that a layer has; where Gemma 2's four norms are, the second is not the one before the MLP."""
_ITERATIONS = 100  # of Sinkhorn, a usual number, for the estimate


class OptDeus(Method):
    name = "opt-deus"
    title = "OpT-DeUS"
    paper = "https://arxiv.org/abs/2508.08011"
    position = "top"
    zero_init = True
    vectors = "fused"
    draws = False

    def units(self, job: Job) -> list[Unit]:
        fused = job.vectors == "fused"
        types = tuple(t for t in job.anatomy.types.values() if t.kind == "matrix" or (fused and t.kind == "vector"))
        rows = max((t.d1 for t in job.anatomy.matrices), default=0)
        flops = 4.0 * _ITERATIONS * rows + 4.0 * rows
        work, made = _work_bytes(job), 4 * sum(math.prod(t.shape) for t in types)
        units = slot_units(
            job,
            types,
            flops_per_element=flops,
            tensors_in_memory=2,  # as they are read
            extra_bytes=made + work,
            device_bytes=work,
        )
        if job.config.gpus_per_task == 0:
            for unit in units:
                _require_budget(job, unit.memory)
        return units

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.expansion.transport import fuse_layer

        in_share = unit.device_memory <= DEVICE_SHARE * context.device_memory
        _require_budget(job, unit.memory - (unit.device_memory if in_share else 0))
        device = "cuda" if in_share and fits_device(unit.device_memory, context.device) else "cpu"
        if in_share and device == "cpu" and unit.memory > (job.config.memory_budget or unit.memory):
            raise MachineError(f"{unit.name}: the GPU is taken, and the memory budget has no room for its part as well")
        slot = next(slot for slot in job.plan.slots if slot.id == unit.makes[0][0])
        assert slot.upper is not None, "a fused layer lies between two"
        makes = [name for _, name in unit.makes]
        roles = tensor_roles(job.anatomy.types)
        needed = {name: role for name, role in roles.items() if name in makes or _shapes_others(role)}
        done = 0

        def seen(name: str) -> None:
            nonlocal done
            done += 1
            if context.progress:
                context.progress(f"aligning {name.removesuffix('.weight')}", (done - 1) / len(needed))

        fused = fuse_layer(
            _Layer(slot.lower, tuple(needed), tensors, seen),
            _Layer(slot.upper, tuple(needed), tensors, lambda name: None),
            needed,
            divide_marginals=job.config.recipe == "paper",
            device=device,
        )
        for slot_id, name in unit.makes:
            tensors.write(slot_id, name, fused.tensors[name])
        return {"transport": {name: asdict(solve) for name, solve in fused.solves.items()}}


def _work_bytes(job: Job) -> int:
    """Peak bytes of an alignment where it is computed, all float64: two matrices and the lower one aligned, five
    matrices of the plan's size, and attention's map, which waits for the feed-forward."""
    rows = max((t.d1 for t in job.anatomy.matrices), default=0)
    largest = max((math.prod(t.shape) for t in job.anatomy.matrices), default=0)
    outputs = [name for name, role in tensor_roles(job.anatomy.types).items() if _shapes_others(role)]
    width = max((job.anatomy.types[name].d1 for name in outputs), default=0)
    return 24 * largest + 40 * rows**2 + 8 * width**2


def _require_budget(job: Job, needed: int) -> None:
    """Raises: RoomError if a budget that was given is smaller."""
    require_budget(job.config.memory_budget, needed, f"{job.method.name}, to align two layers,", "or take avg-deus")


class _Layer(Mapping[str, "torch.Tensor"]):
    """A layer's tensors, each read when it is asked for."""

    def __init__(self, layer: int, names: tuple[str, ...], tensors: Tensors, seen: Any) -> None:
        self._layer, self._names, self._tensors, self._seen = layer, names, tensors, seen

    def __getitem__(self, name: str) -> torch.Tensor:
        self._seen(name)
        return self._tensors.read(self._layer, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shapes_others(role: Role) -> bool:
    """Whether other tensors go through this one's plan."""
    return role.name == "ATTENTION_OUTPUT"


def tensor_roles(types: Mapping[str, WeightType]) -> dict[str, Role]:
    """What each matrix and vector of a layer is to the alignment, from its name."""
    from lesa_ray.expansion.transport import Role

    writers = set(residual_writers(types))
    before_mlp = next((n for n in _NORMS_BEFORE_MLP if any(t.startswith(f"{n}.") for t in types)), None)
    roles: dict[str, Role] = {}
    for name, weight_type in types.items():
        if weight_type.kind == "matrix":
            if name in writers:
                roles[name] = Role.ATTENTION_OUTPUT if in_attention(name) else Role.MLP_OUTPUT
            else:
                roles[name] = Role.ATTENTION_INPUT if in_attention(name) else Role.MLP_INPUT
        elif weight_type.kind == "vector":
            is_norm = before_mlp is not None and name.startswith(f"{before_mlp}.")
            roles[name] = Role.NORM_BEFORE_MLP if is_norm else Role.OTHER_VECTOR
    return roles
