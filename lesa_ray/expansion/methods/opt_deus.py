"""OpT-DeUS: the lower neighbour, aligned to the upper by optimal transport, and their mean (arXiv 2508.08011;
github.com/voalmciaf/OpT-DeUS, Model/OT-DUS.py). Output projections are zero, so the function is kept.

One slot is one unit. The alignment of attention's output is needed for the feed-forward even though that tensor itself
ends up zero; the feed-forward's output is not aligned unless a later slot is made from it. The arithmetic is in
`lesa_ray.expansion.transport`; here the tensors of a layer get their roles, by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.anatomy import WeightType
from lesa_ray.checkpoint.blocks import in_attention
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.expansion.method import Job, Method, RunContext, Tensors, Unit
from lesa_ray.expansion.methods.slots import slot_units

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
        return slot_units(job, types, flops_per_element=flops, tensors_in_memory=6, extra_bytes=40 * rows * rows)

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        from lesa_ray.expansion.transport import fuse_layer

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
            device=context.device,
        )
        for slot_id, name in unit.makes:
            tensors.write(slot_id, name, fused.tensors[name])
        return {"transport": {name: asdict(solve) for name, solve in fused.solves.items()}}


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
