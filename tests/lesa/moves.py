"""Random moves of the private side that keep the function, and models and layers to try them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lesa_ray.checkpoint.anatomy import Anatomy, read_anatomy
from lesa_ray.checkpoint.blocks import Attention, Block, Mlp, Part, Rotation, read_blocks
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.lesa.symmetry import HeadMap, Map, NeuronMap

QKVO: dict[str, Part] = {"q": "q", "k": "k", "v": "v", "o": "o"}
GATED: dict[str, Part] = {"gate": "gate", "up": "up", "down": "down"}
PLAIN: dict[str, Part] = {"fc1": "gate", "fc2": "down"}


def attention(heads: int, groups: int, size: int, query: Rotation = "planes", value: Rotation = "any") -> Attention:
    return Attention(QKVO, tuple(QKVO), heads, groups, size, query, value)


def mlp(neurons: int, parts: Mapping[str, Part] = GATED) -> Mlp:
    return Mlp(parts, tuple(name for name in parts if not name.endswith("bias")), neurons)


def random_layer(block: Block, width: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors of a block, matrices as (out_features, in_features), with entries of order one."""
    generator = torch.Generator().manual_seed(seed)
    layer = {}
    for name, part in block.parts.items():
        if isinstance(block, Mlp):
            rows = block.neurons
        else:
            assert isinstance(block, Attention)
            rows = block.size * (block.heads if part in ("q", "o") else block.groups)
        weight = torch.randn(rows, width, generator=generator, dtype=dtype)
        if name.endswith("bias"):
            weight = weight[:, 0]
        layer[name] = weight.T.contiguous() if part in ("o", "down") else weight
    return layer


def random_map(block: Block, seed: int) -> Map:
    """Any map that the block allows."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(block, Mlp):
        signs = torch.randint(0, 2, (block.neurons,), generator=generator) * 2 - 1
        flips = "up" in block.parts.values()
        return NeuronMap(torch.randperm(block.neurons, generator=generator), signs if flips else torch.ones_like(signs))
    assert isinstance(block, Attention)
    per = block.heads // block.groups
    groups = torch.randperm(block.groups, generator=generator)
    order = torch.cat([int(g) * per + torch.randperm(per, generator=generator) for g in groups])
    query, value = (
        torch.stack([_rotation(block.size, kind, generator) for _ in range(block.groups)])
        for kind in (block.query_rotation, block.value_rotation)
    )
    return HeadMap(order, query, value)


def _rotation(size: int, kind: Rotation, generator: torch.Generator) -> Tensor:
    if kind == "none":
        return torch.eye(size, dtype=torch.float64)
    if kind == "any":
        q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return q
    angles = torch.rand(size // 2, generator=generator, dtype=torch.float64) * 6.3
    turn = torch.diag(angles.cos().repeat(2))
    half = size // 2
    for j in range(half):
        turn[j, j + half], turn[j + half, j] = -angles[j].sin(), angles[j].sin()
    return turn


def blocks_in(folder: str) -> tuple[Anatomy, tuple[Attention, Mlp]]:
    anatomy = read_anatomy(open_checkpoint(folder))
    return anatomy, read_blocks(anatomy, "test")


@torch.no_grad()
def move_model(model: Any, anatomy: Anatomy, layer: int, block: Block, mapping: Map) -> None:
    """Move one block of a loaded model in place."""
    tensors = dict(model.named_parameters())
    for name, part in block.parts.items():
        tensor = as_out_in(anatomy, name, tensors[anatomy.name(layer, name)])
        tensor.copy_(mapping.moved(part, tensor))


def as_out_in(anatomy: Anatomy, name: str, tensor: Tensor) -> Tensor:
    """A view as (out_features, in_features), however it is stored."""
    return tensor.T if anatomy.types[name].transposed else tensor


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> Tensor:
    """Logits or hidden states in the model's own precision."""
    out = model(input_ids=ids)
    result: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return result
