"""The two blocks of a layer, attention and MLP, and what lies on their private side.

A block reads the residual stream, which all layers share, and writes into it. What is between is its own: the order of
the MLP's neurons and of attention's heads means nothing, and may differ from layer to layer though the layers compute
the same. Whoever compares layers number by number has to know which rows and columns lie on that side, and what may
be done to them without changing the function:

- neurons may change places; where a gate multiplies a linear projection, that projection and the output may both
  change sign;
- groups of heads that share a key and value head may change places, and so may the query heads within a group;
- values and the columns of the output projection that read them may be turned by any rotation of a head; so may
  queries and keys where positions are not in them, and where rotary embeddings are, by a rotation in each of their
  planes, as those commute with it (arXiv 2104.09864, section 3.2.2, in the half-split layout of transformers' Llama).

Parts are known by their names, as everywhere; head counts come from config.json and must agree with the shapes. Which
rotations are sound, and in which order the rows of fused projections lie, is in neither names nor shapes, so both stand
in tables of families; for others no rotation is taken, and fused projections are refused. So are experts, and any
tensor on the private side whose meaning is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lesa_ray.checkpoint.anatomy import Anatomy, WeightType
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.checkpoint.settings import HEAD_KEYS, configured
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""What a tensor is to its block. `gate` is any projection whose neurons keep their sign, `up` one that may change it
together with `down`. The private side are the columns of `o` and `down`, the rows of the others."""
Rotation = Literal["any", "planes", "none"]

_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|attn|attention|self_attention|mixer)\.")
_INPUTS: dict[Part, re.Pattern[str]] = {
    "q": re.compile(r"(?:^|\.)(?:q_proj|query|wq)\.weight$"),
    "k": re.compile(r"(?:^|\.)(?:k_proj|key|wk)\.weight$"),
    "v": re.compile(r"(?:^|\.)(?:v_proj|value|wv)\.weight$"),
}
_GATED = (("gate_proj", "up_proj"), ("w1", "w3"))
"""Pairs of MLP inputs of which the first goes through the activation and multiplies the second."""
_HEAD_NORM = re.compile(r"(?:^|\.)[qk]_norm\.weight$")
_NORM = re.compile(r"^[\w]*(?:norm|ln_\w+)\d*\.(?:weight|bias)$", re.IGNORECASE)
"""A norm beside the two blocks, before or after one of them: on the residual stream."""
_FREQUENCIES = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
"""Constants of the rotary embedding, which older checkpoints hold in every layer."""
_NORM_OF_RESULT = re.compile(r"(?:^|\.)output\.LayerNorm\.")
"""BERT's norms, within the block but on the residual stream."""
_ROTATION: dict[str, Rotation] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "layerwise_llama"), "planes"),
    **dict.fromkeys(("bert", "roberta", "opt", "gpt2"), "any"),
    **dict.fromkeys(("phi3", "gpt_neox"), "planes"),
}
"""By config.json's model_type, read off transformers' model files: half-split rotary embeddings, or positions added to
the embeddings; in all of them values are summed and read by the output projection as they are."""
_FUSED: dict[str, dict[str, tuple[tuple[Part, ...], bool]]] = {
    "phi3": {"self_attn.qkv_proj": (("q", "k", "v"), False), "mlp.gate_up_proj": (("gate", "up"), False)},
    "gpt_neox": {"attention.query_key_value": (("q", "k", "v"), True)},
    "gpt2": {"attn.c_attn": (("q", "k", "v"), False)},
}
"""Likewise: the projections in one matrix, in order, and whether the rows lie head by head."""
_PARTLY: dict[str, float] = {"gpt_neox": 0.25}
"""Families of which only a share of each head is rotated where config.json does not say how much."""


@dataclass(frozen=True)
class Fused:
    """Several projections in one matrix (out_features, in_features), or their biases in one vector."""

    parts: tuple[Part, ...]
    rows: tuple[int, ...]
    """Of each."""
    runs: int
    """The rows lie in so many runs, each with its share of every part in turn: 1, or the number of heads."""

    def split(self, tensor: Tensor) -> list[tuple[Part, Tensor]]:
        """Each projection by itself."""
        import torch

        runs = tensor.reshape(self.runs, -1, *tensor.shape[1:])
        split = torch.split(runs, [rows // self.runs for rows in self.rows], dim=1)
        return [(part, one.flatten(0, 1)) for part, one in zip(self.parts, split, strict=True)]

    def joined(self, pieces: Iterable[Tensor]) -> Tensor:
        """`split` undone."""
        import torch

        return torch.cat([one.reshape(self.runs, -1, *one.shape[1:]) for one in pieces], dim=1).flatten(0, 1)


Role = Part | Fused
"""What a tensor is to its block."""


@dataclass(frozen=True)
class Block:
    """One block of a layer: its tensors with a private side, by their weight types' names, in a layer's order."""

    parts: Mapping[str, Role]
    """Matrices, and the biases that lie on the private side."""
    matrices: tuple[str, ...]

    def named(self, *parts: Part) -> Iterator[str]:
        """The matrices that are, or hold, one of `parts`."""
        return (name for name in self.matrices if set(parts_in(self.parts[name])) & set(parts))


@dataclass(frozen=True)
class Attention(Block):
    """Query heads lie group by group: heads g·m … g·m + m − 1 read the keys and values of group g."""

    heads: int
    groups: int
    size: int
    """Of a head."""
    query_rotation: Rotation
    """What queries and keys of a group may be turned by."""
    value_rotation: Rotation


@dataclass(frozen=True)
class Mlp(Block):
    """A neuron is a row of each input and a column of the output."""

    neurons: int


def pieces(role: Role, tensor: Tensor) -> list[tuple[Part, Tensor]]:
    """The parts that a tensor holds, each by itself."""
    return role.split(tensor) if isinstance(role, Fused) else [(role, tensor)]


def parts_in(role: Role) -> tuple[Part, ...]:
    """The parts that a tensor holds."""
    return role.parts if isinstance(role, Fused) else (role,)


def in_attention(weight_type: str) -> bool:
    """Whether a tensor's name says that it belongs to attention."""
    return _ATTENTION.search(weight_type) is not None


def read_blocks(anatomy: Anatomy, asker: str, hint: str = "") -> tuple[Attention, Mlp]:
    """The blocks of a model's layers. `asker` begins the message, `hint` ends it.

    Raises: UserError, one line, if a tensor's place on the private side is not known.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"{asker}: {anatomy.family} layers cannot be matched: {why}{hint}")

    if anatomy.own is not None:
        raise refuse("layers are of several kinds")
    if any(t.is_expert or t.kind == "router" for t in anatomy.types.values()):
        raise refuse("which expert of one layer corresponds to which of another is not known")
    writers = set(residual_writers(anatomy.types))
    attention, mlp = _attention(anatomy, writers, refuse), _mlp(anatomy, writers, refuse)
    width = anatomy.types[next(attention.named("o"))].d1
    for vector in anatomy.vectors:
        name = vector.name
        if name in attention.parts or name in mlp.parts or _FREQUENCIES.search(name):
            continue
        if _HEAD_NORM.search(name) and vector.shape == (attention.size,):
            continue
        is_norm = _NORM_OF_RESULT.search(name) or (_NORM.search(name) and not in_attention(name))
        if vector.shape != (width,) or not (name in writers or is_norm):
            raise refuse(f"what {name} {list(vector.shape)} belongs to is not known")
    return attention, mlp


def _attention(anatomy: Anatomy, writers: set[str], refuse: Any) -> Attention:
    members = [t for t in anatomy.matrices if in_attention(t.name)]
    heads = _query_heads(anatomy.config)
    parts: dict[str, Role] = {}
    shapes: dict[Part, int] = {}
    for weight_type in members:
        name = weight_type.name
        part = "o" if name in writers else next((p for p, names in _INPUTS.items() if names.search(name)), None)
        fused = _fused(anatomy.family, name)
        if part is not None:
            parts[name] = part
            shapes[part] = weight_type.d2 if part == "o" else weight_type.d1
        elif fused is not None and heads:
            of_output = sum(t.d2 for t in members if t.name in writers)
            shared = (weight_type.d1 - of_output) // 2  # of keys, and as many of values
            parts[name] = Fused(fused[0], (of_output, shared, shared), heads if fused[1] else 1)
            shapes |= {"q": of_output, "k": shared, "v": weight_type.d1 - of_output - shared}
        elif heads:
            raise refuse(f"{name} is none of query, key, value and output, or several of them in one")
    if not heads:
        raise refuse("config.json does not say num_attention_heads")
    if len(shapes) != 4 or sum(len(parts_in(role)) for role in parts.values()) != 4:
        found = ", ".join(parts) or "no matrix"
        raise refuse(f"attention has one query, key, value and output projection each, here it has {found}")
    size = shapes["q"] // heads
    groups = shapes["k"] // size if size else 0
    alike = shapes["q"] == shapes["o"] == heads * size and shapes["k"] == shapes["v"] == groups * size
    by_head = any(isinstance(role, Fused) and role.runs > 1 for role in parts.values())
    if not (size and groups and alike) or heads % groups or (by_head and groups != heads):
        raise refuse(f"projections of {shapes} rows and columns are not {heads} heads of one size")
    rotation = _ROTATION.get(anatomy.family, "none")
    head_norms = any(_HEAD_NORM.search(name) for name in anatomy.types)
    turned = rotation == "any" or not (head_norms or _partly_rotary(anatomy))
    return Attention(
        parts=_with_biases(anatomy.types, parts, ("q", "k", "v")),
        matrices=tuple(parts),
        heads=heads,
        groups=groups,
        size=size,
        query_rotation=rotation if turned else "none",
        value_rotation="none" if rotation == "none" else "any",
    )


def _query_heads(config: Mapping[str, Any]) -> int:
    """What config.json says, 0 where it does not: where it says so of each layer, the widest one's."""
    each: list[int] | None = config.get("num_attention_heads_per_layer")
    if each:
        return max(each)
    return configured(config, HEAD_KEYS) or 0


def _partly_rotary(anatomy: Anatomy) -> bool:
    """Whether only a part of each head is rotated."""
    config = anatomy.config
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    said = [config.get("partial_rotary_factor"), config.get("rotary_pct"), nested.get("partial_rotary_factor")]
    factors = [factor for factor in said if factor is not None] or [_PARTLY.get(anatomy.family, 1)]
    return any(factor != 1 for factor in factors)


def _mlp(anatomy: Anatomy, writers: set[str], refuse: Any) -> Mlp:
    members = [t for t in anatomy.matrices if not in_attention(t.name)]
    outputs = [t for t in members if t.name in writers]
    inputs = [t for t in members if t.name not in writers]
    if len(outputs) != 1 or not inputs:
        found = ", ".join(t.name for t in members) or "no matrix"
        raise refuse(f"an MLP has inputs and one output projection, here it has {found}")
    neurons = outputs[0].d2
    linear = next((up for gate, up in _GATED if _modules(inputs) == {gate, up}), None)
    parts: dict[str, Role] = {t.name: "up" if linear and _module(t) == linear else "gate" for t in inputs}
    for weight_type in inputs:
        fused = _fused(anatomy.family, weight_type.name)
        if fused is not None and len(inputs) == 1 and weight_type.d1 == len(fused[0]) * neurons:
            parts[weight_type.name] = Fused(fused[0], (neurons,) * len(fused[0]), 1)
        elif weight_type.d1 != neurons:
            raise refuse(f"{weight_type.name} has {weight_type.d1} rows for {neurons} neurons: several in one")
    parts[outputs[0].name] = "down"
    ordered = {t.name: parts[t.name] for t in members}
    return Mlp(parts=_with_biases(anatomy.types, ordered, ("gate", "up")), matrices=tuple(ordered), neurons=neurons)


def _with_biases(
    types: Mapping[str, WeightType], parts: Mapping[str, Role], private: tuple[Part, ...]
) -> dict[str, Role]:
    """`parts` and the biases of those whose rows are private, which belong to the same part."""
    biases = {
        bias: part
        for name, part in parts.items()
        if set(parts_in(part)) <= set(private) and (bias := name.removesuffix("weight") + "bias") in types
    }
    return {**parts, **biases}


def _fused(family: str, name: str) -> tuple[tuple[Part, ...], bool] | None:
    return _FUSED.get(family, {}).get(name.removesuffix(".weight"))


def _module(weight_type: WeightType) -> str:
    return weight_type.name.removesuffix(".weight").rsplit(".", 1)[-1]


def _modules(types: list[WeightType]) -> set[str]:
    return {_module(weight_type) for weight_type in types}
