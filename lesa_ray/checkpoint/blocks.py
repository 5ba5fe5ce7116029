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
rotations are sound is not in names or shapes, so it stands in a table of families; for others no rotation is taken.
Fused projections and experts are refused, as is any tensor on the private side whose meaning is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lesa_ray.checkpoint.anatomy import Anatomy, WeightType
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.errors import UserError

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
_NORM_OF_RESULT = re.compile(r"(?:^|\.)output\.LayerNorm\.")
"""BERT's norms, within the block but on the residual stream."""
_ROTATION: dict[str, Rotation] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), "planes"),
    **dict.fromkeys(("bert", "roberta", "opt"), "any"),
}
"""By config.json's model_type, read off transformers' model files: half-split rotary embeddings over whole heads, or
positions added to the embeddings; in all of them values are summed and read by the output projection as they are."""


@dataclass(frozen=True)
class Block:
    """One block of a layer: its tensors with a private side, by their weight types' names, in a layer's order."""

    parts: Mapping[str, Part]
    """Matrices, and the biases that lie on the private side."""
    matrices: tuple[str, ...]

    def named(self, *parts: Part) -> Iterator[str]:
        """The matrices that are one of `parts`."""
        return (name for name in self.matrices if self.parts[name] in parts)


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


def in_attention(weight_type: str) -> bool:
    """Whether a tensor's name says that it belongs to attention."""
    return _ATTENTION.search(weight_type) is not None


def read_blocks(anatomy: Anatomy, asker: str, hint: str = "") -> tuple[Attention, Mlp]:
    """The blocks of a model's layers. `asker` begins the message, `hint` ends it.

    Raises: UserError, one line, if a tensor's place on the private side is not known.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"{asker}: {anatomy.family} layers cannot be matched: {why}{hint}")

    if any(t.is_expert or t.kind == "router" for t in anatomy.types.values()):
        raise refuse("which expert of one layer corresponds to which of another is not known")
    writers = set(residual_writers(anatomy.types))
    attention, mlp = _attention(anatomy, writers, refuse), _mlp(anatomy, writers, refuse)
    width = anatomy.types[next(attention.named("o"))].d1
    for vector in anatomy.vectors:
        name = vector.name
        if name in attention.parts or name in mlp.parts:
            continue
        if _HEAD_NORM.search(name) and vector.shape == (attention.size,):
            continue
        is_norm = _NORM_OF_RESULT.search(name) or (_NORM.search(name) and not in_attention(name))
        if vector.shape != (width,) or not (name in writers or is_norm):
            raise refuse(f"what {name} {list(vector.shape)} belongs to is not known")
    return attention, mlp


def _attention(anatomy: Anatomy, writers: set[str], refuse: Any) -> Attention:
    members = [t for t in anatomy.matrices if in_attention(t.name)]
    parts: dict[str, Part] = {}
    for weight_type in members:
        name = weight_type.name
        part = "o" if name in writers else next((p for p, names in _INPUTS.items() if names.search(name)), None)
        if part is None:
            raise refuse(f"{name} is none of query, key, value and output, or several of them in one")
        parts[name] = part
    of = {part: anatomy.types[name] for name, part in parts.items()}
    if len(members) != 4 or len(of) != 4:
        found = ", ".join(parts) or "no matrix"
        raise refuse(f"attention has one query, key, value and output projection each, here it has {found}")
    heads = next((v for key in ("num_attention_heads", "n_head") if isinstance(v := anatomy.config.get(key), int)), 0)
    if not heads:
        raise refuse("config.json does not say num_attention_heads")
    rows, size = of["q"].d1, of["q"].d1 // heads
    groups = of["k"].d1 // size if size else 0
    shapes = {"q": rows, "k": of["k"].d1, "v": of["v"].d1, "o": of["o"].d2}
    fits = size and groups and rows == heads * size == of["o"].d2 and of["k"].d1 == of["v"].d1 == groups * size
    if not fits or heads % groups:
        raise refuse(f"projections of {shapes} rows and columns are not {heads} heads of one size")
    rotation = _ROTATION.get(anatomy.family, "none")
    head_norms = any(_HEAD_NORM.search(name) for name in anatomy.types)
    turned = rotation == "any" or not (head_norms or _partly_rotary(anatomy.config))
    return Attention(
        parts=_with_biases(anatomy.types, parts, ("q", "k", "v")),
        matrices=tuple(parts),
        heads=heads,
        groups=groups,
        size=size,
        query_rotation=rotation if turned else "none",
        value_rotation="none" if rotation == "none" else "any",
    )


def _partly_rotary(config: Mapping[str, Any]) -> bool:
    """Whether only a part of each head is rotated."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factors = [config.get("partial_rotary_factor"), nested.get("partial_rotary_factor")]
    return any(factor not in (None, 1, 1.0) for factor in factors)


def _mlp(anatomy: Anatomy, writers: set[str], refuse: Any) -> Mlp:
    members = [t for t in anatomy.matrices if not in_attention(t.name)]
    outputs = [t for t in members if t.name in writers]
    inputs = [t for t in members if t.name not in writers]
    if len(outputs) != 1 or not inputs:
        found = ", ".join(t.name for t in members) or "no matrix"
        raise refuse(f"an MLP has inputs and one output projection, here it has {found}")
    neurons = outputs[0].d2
    for weight_type in inputs:
        if weight_type.d1 != neurons:
            raise refuse(f"{weight_type.name} has {weight_type.d1} rows for {neurons} neurons: several in one")
    linear = next((up for gate, up in _GATED if _modules(inputs) == {gate, up}), None)
    parts: dict[str, Part] = {t.name: "up" if linear and _module(t) == linear else "gate" for t in inputs}
    parts[outputs[0].name] = "down"
    ordered = {t.name: parts[t.name] for t in members}
    return Mlp(parts=_with_biases(anatomy.types, ordered, ("gate", "up")), matrices=tuple(ordered), neurons=neurons)


def _with_biases(
    types: Mapping[str, WeightType], parts: Mapping[str, Part], private: tuple[Part, ...]
) -> dict[str, Part]:
    """`parts` and the biases of those whose rows are private, which belong to the same part."""
    biases = {
        bias: part
        for name, part in parts.items()
        if part in private and (bias := name.removesuffix("weight") + "bias") in types
    }
    return {**parts, **biases}


def _module(weight_type: WeightType) -> str:
    return weight_type.name.removesuffix(".weight").rsplit(".", 1)[-1]


def _modules(types: list[WeightType]) -> set[str]:
    return {_module(weight_type) for weight_type in types}
