"""Layers that differ in width: the one rule by which every method works on them, and new layers get a width.

A layer's private side, between what reads the residual stream and what writes into it, are its FFN neurons and its
query heads, which lie in groups that share a KV head. Where layers differ there, or new layers are to be narrower or
wider than old ones (`new_width`):

1. Pad. Layers are read as if all were as wide as the widest: with zero neurons, and zero query heads at the end of each
   group. The function of a layer stays what it is. The method runs on these as on even layers.
2. Width. A slot's is interpolated linearly, by its place, between the nearest old layers below and above it, times its
   `new_width`: FFN neurons to a multiple that the base itself uses, by the rounding of `layerwise.profiles`, query
   heads to the nearest multiple of the KV heads, one at least. KV heads stay: the groups are what layers have in
   common. So where every query head has a KV head of its own, heads can only be doubled, trebled and so on.
3. Cut. Of the method's result the neurons of largest norm are kept, and of each group the heads: input and output
   weights together, in the order they had. An output projection that nobody makes, as it will be zero, does not count.
4. Add. What is still missing to the slot's width gets output weights of zero, so that the function stays, and input
   weights drawn at random, as large as those kept. Of the first gradient of the added output weights, over the old
   ones', on the demo's base (512 → 1,024 neurons): 0.24; drawn a tenth as large: 0.002; zero on both sides: 0, and it
   stays there; copies of the old neurons: 1.00, but it is the originals' gradient (cosine 1.000), so that nothing new
   is learnt at first: its directions number 19 (participation ratio of its singular values), the random ones' 35. In
   held-out loss 25 steps showed no difference between the four.

Methods that copy whole layers keep the copied layer's width unless `new_width` is given. Methods that match neurons one
to one are left out, as are bases whose layers differ in KV heads. Magnitude is the simplest measure of importance there
is (Li et al., arXiv 1608.08710, section 3, for filters): it needs no data, but it also sees how a neuron's scale is
split between its two sides, which the function does not show. Padding costs the method the widest layer's time for each
layer, cutting two more readings of a slot's private side; one tensor is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lesa_ray.checkpoint.anatomy import Anatomy, WeightType
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.errors import UserError
from lesa_ray.expansion.plan import New, Old, Plan
from lesa_ray.layerwise.profiles import make_divisible

if TYPE_CHECKING:
    from torch import Generator, Tensor

Side = Literal["neurons", "heads"]
SIDES: tuple[Side, ...] = ("neurons", "heads")
PRIVATE: dict[str, tuple[Side, int]] = {
    "self_attn.q_proj.weight": ("heads", 0),
    "self_attn.q_proj.bias": ("heads", 0),
    "self_attn.o_proj.weight": ("heads", 1),
    "mlp.gate_proj.weight": ("neurons", 0),
    "mlp.gate_proj.bias": ("neurons", 0),
    "mlp.up_proj.weight": ("neurons", 0),
    "mlp.up_proj.bias": ("neurons", 0),
    "mlp.down_proj.weight": ("neurons", 1),
}
"""Weight types with a private side of varying width, and the axis it is: 0 what reads, 1 what writes."""
RULE = (
    "layers padded to the widest; a new layer's width interpolated between the old layers around it, times new_width; "
    "neurons, and heads within their group, of largest norm kept; added ones: output weights zero, input weights random"
)
"""The rule in a line, for the manifest."""
WHOLE_LAYERS = "; whole layers can be copied by llama-pro and solar"
"""What expand can do where layers differ in ways that the rule does not know."""
_OFF = 0.1
"""Heads that are further off what was asked, as a share of that, are told."""
_LARGEST_MULTIPLE = 256  # of FFN widths, as layerwise.budget's
_FINEST = 16
"""Where all layers are alike one width says little of its multiple (64 of 64): it is at most a sixteenth then."""


@dataclass(frozen=True, slots=True)
class Width:
    """How wide one layer is."""

    neurons: int
    """Of the FFN."""
    heads: int
    """Query heads."""

    def __getitem__(self, side: Side) -> int:
        return self.neurons if side == "neurons" else self.heads


@dataclass(frozen=True)
class Widths:
    """The widths of all layers, decided. Picklable."""

    base: tuple[Width, ...]
    slots: tuple[Width, ...]
    """By id, from the number of base layers on."""
    kv_heads: int
    head_dim: int
    multiple: int
    """Of the slots' neurons."""
    asked_heads: tuple[float, ...] = ()
    """The slots' query heads before they are rounded."""

    @cached_property
    def widest(self) -> Width:
        """Of the base: what layers are padded to and methods work at."""
        return Width(max(width.neurons for width in self.base), max(width.heads for width in self.base))

    @property
    def are_even(self) -> bool:
        """Whether all layers, the new ones too, have one width."""
        return len({*self.base, *self.slots}) == 1

    @property
    def off(self) -> tuple[int, ...]:
        """Slots, from 0, whose query heads are more than a tenth off what was asked."""
        pairs = zip(self.slots, self.asked_heads, strict=True)
        return tuple(at for at, (slot, asked) in enumerate(pairs) if abs(slot.heads - asked) > _OFF * asked)

    @property
    def note(self) -> str | None:
        """What a person should know of these slots' heads; None if there are none."""
        if not self.off:
            return None
        most = max(self.off, key=lambda at: abs(self.slots[at].heads / self.asked_heads[at] - 1))
        others = f", the most of {len(self.off)} new layers" if len(self.off) > 1 else ""
        return (
            f"query heads come in steps of the {self.kv_heads} KV heads: {self.slots[most].heads} instead of "
            f"{self.asked_heads[most]:.3g}{others}"
        )

    def of(self, layer: int) -> Width:
        """A layer's width, by id."""
        return self.base[layer] if layer < len(self.base) else self.slots[layer - len(self.base)]

    def changes(self, slot: int, weight_type: str) -> bool:
        """Whether a slot's tensor differs in width, or may hold padding, when the method has made it."""
        if weight_type not in PRIVATE:
            return False
        side = PRIVATE[weight_type][0]
        return len({width[side] for width in (*self.base, self.of(slot))}) > 1

    def shape(self, weight_type: WeightType, width: Width) -> tuple[int, ...]:
        """A weight type's shape in a layer of that width."""
        if weight_type.name not in PRIVATE:
            return weight_type.shape
        side, axis = PRIVATE[weight_type.name]
        size = width.neurons if side == "neurons" else width.heads * self.head_dim
        return (*weight_type.shape[:axis], size, *weight_type.shape[axis + 1 :])

    def padded_types(self, types: Mapping[str, WeightType]) -> dict[str, WeightType]:
        """The weight types as wide as the widest layer's."""
        return {name: replace(one, shape=self.shape(one, self.widest)) for name, one in types.items()}

    def padded(self, weight_type: str, layer: int, tensor: Tensor) -> Tensor:
        """A base layer's tensor as wide as the widest layer's."""
        own = self.base[layer]
        if weight_type not in PRIVATE or own[PRIVATE[weight_type][0]] == self.widest[PRIVATE[weight_type][0]]:
            return tensor
        side, axis = PRIVATE[weight_type]
        members = self.members(side, own)
        every = [[*range(members)] + [-1] * (self.members(side, self.widest) - members)] * self.groups(side)
        return taken(tensor, axis, every, members, self.size(side))

    def groups(self, side: Side) -> int:
        """How many groups a side has whose members stay among themselves."""
        return 1 if side == "neurons" else self.kv_heads

    def size(self, side: Side) -> int:
        """Rows or columns of one neuron or head."""
        return 1 if side == "neurons" else self.head_dim

    def members(self, side: Side, width: Width) -> int:
        """Neurons or heads of one group."""
        return width[side] // self.groups(side)


def plan_widths(checkpoint: Checkpoint, anatomy: Anatomy, plan: Plan, factors: Sequence[float] | None) -> Widths:
    """The widths of a base's layers, by the shapes of its tensors, and of a plan's slots.

    factors: `new_width`. Raises: UserError if layers differ in KV heads, or there are more factors than slots.
    """
    return with_slots(read_widths(checkpoint, anatomy, WHOLE_LAYERS), plan, factors or (1.0,))


def read_widths(checkpoint: Checkpoint, anatomy: Anatomy, hint: str = "") -> Widths:
    """The widths of a model's layers, by the shapes of its tensors, which have Llama's names; no slots.

    Raises: UserError, which ends with `hint`, if layers differ in KV heads."""
    config, base = checkpoint.config, checkpoint.base
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if (norm := anatomy.types.get("self_attn.q_norm.weight")) is not None:  # Qwen3's default is no quotient
        head_dim = norm.shape[0]

    def rows(layer: int, name: str) -> int:
        return checkpoint.tensors[anatomy.name(layer, name)].shape[0]

    layers = range(anatomy.layers)
    kv_heads = sorted({rows(layer, "self_attn.k_proj.weight") // head_dim for layer in layers})
    if len(kv_heads) > 1:
        raise UserError(
            f"BASE {base}: layers are not alike: they have {kv_heads[0]} to {kv_heads[-1]} KV heads, and no sound way "
            f"to mix such is known{hint}"
        )
    widths = tuple(
        Width(rows(layer, "mlp.gate_proj.weight"), rows(layer, "self_attn.q_proj.weight") // head_dim)
        for layer in layers
    )
    return Widths(widths, (), kv_heads[0], head_dim, base_multiple([width.neurons for width in widths]))


def base_multiple(neurons: Sequence[int]) -> int:
    """The largest power of two, 256 at most, that divides all FFN widths; where they are one, a sixteenth at most."""
    common = math.gcd(*neurons, _LARGEST_MULTIPLE)
    while len(set(neurons)) == 1 and common > 1 and common * _FINEST > neurons[0]:
        common //= 2
    return common


def with_slots(widths: Widths, plan: Plan, factors: Sequence[float]) -> Widths:
    """The widths with those of a plan's slots. Raises: UserError if there are more factors than slots."""
    base = widths.base
    places = {output.id: place for place, output in enumerate(plan.outputs)}
    upwards = [output for output in plan.outputs if isinstance(output, New)]
    if len(factors) > len(upwards):
        raise UserError(
            f"--new-width {','.join(f'{factor:g}' for factor in factors)}: {len(factors)} values for {len(upwards)} "
            "new layers; give one, or at most as many as there are new layers"
        )
    found: dict[int, tuple[float, float]] = {}
    for slot, factor in zip(upwards, interpolated(factors, len(upwards)), strict=True):
        below = plan.origin(slot.lower)
        above = next((o.id for o in plan.outputs[places[slot.id] :] if isinstance(o, Old)), below)
        if slot.upper is None:  # it lies between no two, and has what it is a copy of
            above, share = below, 0.0
        else:
            share = (places[slot.id] - places[below]) / (places[above] - places[below])

        def between(side: Side, low: Width, high: Width, share: float = share) -> float:
            return low[side] + (high[side] - low[side]) * share

        neurons, heads = (factor * between(side, base[below], base[above]) for side in SIDES)
        found[slot.id] = neurons, heads
    asked = [found[slot.id] for slot in plan.slots]
    return replace(
        widths,
        slots=tuple(Width(make_divisible(n, widths.multiple), _nearest(h, widths.kv_heads)) for n, h in asked),
        asked_heads=tuple(heads for _, heads in asked),
    )


def _nearest(heads: float, kv_heads: int) -> int:
    """The nearest multiple, of two as near the larger, one at least. Without what `make_divisible` adds lest a width be
    a tenth too small: steps are coarse here, and × 1.2 would become × 2."""
    return max(math.floor(heads / kv_heads + 0.5), 1) * kv_heads


def interpolated(knots: Sequence[float], count: int) -> list[float]:
    """`count` values on the straight lines between knots that are spread evenly from the first to the last."""
    values = []
    for at in range(count):
        place = at * (len(knots) - 1) / (count - 1) if count > 1 else 0.0
        low = min(int(place), max(len(knots) - 2, 0))
        high = min(low + 1, len(knots) - 1)
        values.append(knots[low] + (knots[high] - knots[low]) * (place - low))
    return values


def squares(tensor: Tensor, axis: int, groups: int, size: int) -> Tensor:
    """The squared norm of each neuron or head in one tensor: (groups, members), float64."""
    import torch

    from lesa_ray.lesa.streams import working_dtype

    others = [other for other in range(tensor.ndim) if other != axis]
    norms = torch.linalg.vector_norm(tensor, dim=others, dtype=working_dtype(tensor.dtype)) if others else tensor.abs()
    return norms.double().square().reshape(groups, -1, size).sum(2)


def chosen(norms: Tensor, wanted: int) -> list[list[int]]:
    """Of each group the members of largest norm, in their order; −1 for what is missing, as zeros are not chosen.

    norms: (groups, members). Of equal ones the first is chosen.
    """
    best = norms.argsort(dim=1, descending=True, stable=True)[:, :wanted]
    found = []
    for row, sizes in zip(best.tolist(), norms.gather(1, best).tolist(), strict=True):
        kept = sorted(at for at, size in zip(row, sizes, strict=True) if size > 0)
        found.append(kept + [-1] * (wanted - len(kept)))
    return found


def taken(
    tensor: Tensor, axis: int, choice: Sequence[Sequence[int]], members: int, size: int, noise: Generator | None = None
) -> Tensor:
    """A tensor with the chosen members along `axis`; −1 stands for zeros or, with `noise`, for normal numbers of the
    root mean square of the others.

    members: of each group in `tensor`; size: rows or columns of one.
    """
    import torch

    picked = torch.tensor([[group * members + at if at >= 0 else -1 for at in row] for group, row in enumerate(choice)])
    source = (picked.reshape(-1, 1) * size + torch.arange(size)).reshape(-1)
    is_kept = (picked >= 0).reshape(-1, 1).expand(-1, size).reshape(-1)
    kept = tensor.index_select(axis, source[is_kept])
    if bool(is_kept.all()):
        return kept
    shape = list(tensor.shape)
    shape[axis] = len(source)
    result = tensor.new_zeros(shape).index_copy_(axis, is_kept.nonzero().reshape(-1), kept)
    if noise is not None and kept.numel():
        shape[axis] = len(source) - kept.shape[axis]
        scale = float(torch.linalg.vector_norm(kept, dtype=torch.float32)) / math.sqrt(kept.numel())
        drawn = (torch.randn(shape, generator=noise) * scale).to(tensor.dtype)
        result.index_copy_(axis, (~is_kept).nonzero().reshape(-1), drawn)
    return result
