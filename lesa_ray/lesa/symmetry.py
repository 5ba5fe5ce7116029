"""What may be done to the private side of a block without changing what its layer computes.

A map moves a layer's neurons or heads to other places: `moved` gives a tensor of the layer in its new coordinates,
`restored` takes one back. Every tensor of a block goes through the same map, or the function is lost. Maps follow one
another (`after`), so that correspondences between neighbours make a chain through all layers. Which moves are sound
for which family is `lesa_ray.checkpoint.blocks`' concern.

Tensors are those of the block's parts, matrices as (out_features, in_features) and biases. Moving neurons changes no
number; turning heads is a product in float32, or float64 where the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_ray.checkpoint.blocks import Attention, Block, Fused, Mlp, Part, Role
from lesa_ray.lesa.streams import working_dtype


@dataclass(frozen=True)
class NeuronMap:
    """Neuron a of the moved MLP is neuron order[a] of the MLP, its linear input and its output times signs[a]."""

    order: Tensor
    """(n,) int64."""
    signs: Tensor
    """(n,) of ±1, int64."""

    def moved(self, part: Role, tensor: Tensor) -> Tensor:
        if isinstance(part, Fused):
            return _by_part(self.moved, part, tensor)
        return _shaped_as(tensor, part, self._signed(part, rows_first(part, tensor)[self.order.to(tensor.device)]))

    def restored(self, part: Role, tensor: Tensor) -> Tensor:
        if isinstance(part, Fused):
            return _by_part(self.restored, part, tensor)
        rows = self._signed(part, rows_first(part, tensor))
        return _shaped_as(tensor, part, torch.empty_like(rows).index_copy_(0, self.order.to(tensor.device), rows))

    def after(self, first: NeuronMap) -> NeuronMap:
        """`first`, then this one."""
        return NeuronMap(first.order[self.order], first.signs[self.order] * self.signs)

    def _signed(self, part: Part, rows: Tensor) -> Tensor:
        return rows * self.signs.to(rows).unsqueeze(1) if part in ("up", "down") else rows


@dataclass(frozen=True)
class HeadMap:
    """Query head a of the moved attention is head order[a], turned with its group; so are the groups' keys, values."""

    order: Tensor
    """(heads,) int64; heads of a group stay together."""
    query: Tensor
    """(groups, size, size) float64: what queries and keys of a moved group are multiplied by from the left."""
    value: Tensor
    """(groups, size, size) float64: the same of values, and of what the output projection reads."""

    @property
    def groups(self) -> Tensor:
        """(groups,) int64: moved group g is group groups[g]."""
        size = len(self.order) // len(self.query)
        return self.order[::size] // size

    def moved(self, part: Role, tensor: Tensor) -> Tensor:
        if isinstance(part, Fused):
            return _by_part(self.moved, part, tensor)
        rows = self._by_group(part, rows_first(part, tensor))
        taken = (self.order if part in ("q", "o") else self.groups).to(tensor.device)
        heads = rows.flatten(0, 1)[taken].view_as(rows)
        return _shaped_as(tensor, part, (self._turn(part, rows) @ heads).flatten(0, 2))

    def restored(self, part: Role, tensor: Tensor) -> Tensor:
        if isinstance(part, Fused):
            return _by_part(self.restored, part, tensor)
        rows = self._by_group(part, rows_first(part, tensor))
        heads = self._turn(part, rows).mT @ rows
        taken = (self.order if part in ("q", "o") else self.groups).to(tensor.device)
        back = torch.empty_like(heads).flatten(0, 1).index_copy_(0, taken, heads.flatten(0, 1))
        return _shaped_as(tensor, part, back.flatten(0, 1))

    def after(self, first: HeadMap) -> HeadMap:
        """`first`, then this one."""
        return HeadMap(
            first.order[self.order], self.query @ first.query[self.groups], self.value @ first.value[self.groups]
        )

    def _by_group(self, part: Part, rows: Tensor) -> Tensor:
        """(groups, heads of the part in a group, size, columns)."""
        groups, size = self.query.shape[:2]
        return rows.to(working_dtype(rows.dtype)).reshape(groups, -1, size, rows.shape[1])

    def _turn(self, part: Part, rows: Tensor) -> Tensor:
        return (self.query if part in ("q", "k") else self.value).to(rows).unsqueeze(1)


Map = NeuronMap | HeadMap


def identity(block: Block) -> Map:
    """The map that leaves a layer as it is."""
    if isinstance(block, Mlp):
        return NeuronMap(torch.arange(block.neurons), torch.ones(block.neurons, dtype=torch.int64))
    assert isinstance(block, Attention)
    turn = torch.eye(block.size, dtype=torch.float64).repeat(block.groups, 1, 1)
    return HeadMap(torch.arange(block.heads), turn, turn.clone())


def chained(block: Block, steps: Sequence[Map]) -> list[Map]:
    """Maps of layers 0, 1, 2, … to layer 0's coordinates, from those of layers 1, 2, … to the layer below each."""
    maps = [identity(block)]
    for step in steps:
        last = maps[-1]
        if isinstance(last, NeuronMap) and isinstance(step, NeuronMap):
            maps.append(last.after(step))
        else:
            assert isinstance(last, HeadMap)
            assert isinstance(step, HeadMap)
            maps.append(last.after(step))
    return maps


def rows_first(part: Role, tensor: Tensor) -> Tensor:
    """A view with the private side as rows; of a bias, (rows, 1)."""
    if tensor.ndim == 1:
        return tensor.unsqueeze(1)
    return tensor.T if part in ("o", "down") else tensor


def _by_part(way: Callable[[Role, Tensor], Tensor], fused: Fused, tensor: Tensor) -> Tensor:
    return fused.joined([way(part, piece) for part, piece in fused.split(tensor)])


def _shaped_as(tensor: Tensor, part: Part, rows: Tensor) -> Tensor:
    """`rows_first` undone: contiguous, in the shape of `tensor`."""
    if tensor.ndim == 1:
        return rows.flatten()
    return (rows.T if part in ("o", "down") else rows).contiguous()
