"""Bring the private side of a layer's block into correspondence with another layer's.

Neurons and heads of two layers do not correspond by their numbers: each layer was trained from a random start of its
own, and its neurons may change places without changing what it computes. LESA as published compares them number by
number. Here a layer is moved, without changing its function, to where it is most like the other one.

MLP: a neuron is the vector of its rows in the inputs and its column in the output, moved together; neurons are paired
by the assignment with the largest total cosine (`lesa_ray.lesa.assignment`), the matching of Git Re-Basin (arXiv
2209.04836, section 3.2). Where a gate multiplies a linear projection, a neuron's linear input and output may both
change sign, and do where that makes it more alike.

Attention: groups of heads are paired so that the sum of two cosines is largest, of queries with keys and of values
with outputs, each after the best rotation of the head and the best pairing of the query heads within the group. The
best rotation for values and outputs is orthogonal Procrustes' (Schönemann 1966), one SVD of the sum of products; where
rotary embeddings allow only rotations in planes, the best angle of each plane is that of a complex inner product.
Pairing and rotation depend on each other within a group; they are found in turns, each of which can only gain.

Matching alone makes any two layers more alike, random ones too: compare with `lesa_ray.lesa.matched`.

Cost for n neurons, model width d: 6·n²·d operations and 4·n² bytes beside the layers in float32; the assignment as its
module says. For h heads of size s in g groups: 4·(h·s)²·d operations, 2·(h² + g²) small SVDs, 24·(h·s)² bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lesa_ray.checkpoint.blocks import Attention, Block, Mlp, Part, Rotation, pieces
from lesa_ray.lesa.assignment import assign
from lesa_ray.lesa.bounds import EXACT
from lesa_ray.lesa.streams import row_blocks, working_dtype
from lesa_ray.lesa.symmetry import HeadMap, Map, NeuronMap, rows_first

Layer = Mapping[str, Tensor]
"""The tensors of one block of a layer, by weight type; biases may be there or not."""
TURNS = 8
"""Of pairing and rotating within a group at most; two or three are usual."""


@torch.no_grad()
def align(target: Layer, layer: Layer, block: Block, *, device: str = "cpu", exact: int = EXACT) -> Map:
    """The map that moves `layer` to where it is most like `target`. Matrices alone decide; biases follow.

    target, layer: matrices (out_features, in_features) of `block.parts`, any float type, on any device.
    exact: neurons up to which the pairing is exact.
    """
    if isinstance(block, Mlp):
        return _align_neurons(target, layer, block, device, exact)
    assert isinstance(block, Attention)
    return _align_heads(target, layer, block, device)


def move(layer: Layer, block: Block, mapping: Map) -> dict[str, Tensor]:
    """All tensors of `block` in `layer` that have a private side, moved."""
    return {name: mapping.moved(part, layer[name]) for name, part in block.parts.items() if name in layer}


def _align_neurons(target: Layer, layer: Layer, block: Mlp, device: str, exact: int) -> NeuronMap:
    loose: tuple[Part, ...] = ("up", "down") if any(block.named("up")) else ()

    def stacked(source: Layer, *, signed: bool) -> Tensor:
        """(n, columns): what keeps its sign of each neuron, or what may change it."""
        rows = [_rows(part, tensor, device) for part, tensor in _parts(source, block) if (part in loose) == signed]
        return torch.cat(rows, dim=1)

    below, above = stacked(target, signed=False), stacked(layer, signed=False)
    squares = [rows.square().sum(dim=1) for rows in (below, above)]
    similarity = torch.empty(block.neurons, block.neurons, dtype=below.dtype, device=device)
    for rows in row_blocks(block.neurons):
        torch.mm(below[rows], above.T, out=similarity[rows])
    del below, above
    free = [stacked(source, signed=True) for source in (target, layer)] if loose else []
    if free:
        squares = [square + rows.square().sum(dim=1) for square, rows in zip(squares, free, strict=True)]
        for rows in row_blocks(block.neurons):
            similarity[rows] += (free[0][rows] @ free[1].T).abs_()
    for axis, square in enumerate(squares):
        similarity /= square.sqrt().clamp_min(torch.finfo(square.dtype).tiny).unsqueeze(1 - axis)
    order = assign(similarity, exact)
    signs = torch.ones(block.neurons, dtype=torch.int64)
    if free:
        signs[((free[0] * free[1][order.to(device)]).sum(dim=1) < 0).cpu()] = -1
    return NeuronMap(order, signs)


def _align_heads(target: Layer, layer: Layer, block: Attention, device: str) -> HeadMap:
    groups, size, per = block.groups, block.size, block.heads // block.groups
    turns_of: tuple[tuple[Part, Part, Rotation], ...] = (
        ("q", "k", block.query_rotation),
        ("o", "v", block.value_rotation),
    )
    # (below, above, a, b, s, s) and (below, above, s, s): products of the heads of each pair of groups, both of
    # queries with keys and of outputs with values divided by the groups' norms, so that traces add up to cosines.
    products = []
    for of_heads, of_groups, _ in turns_of:
        pair = [
            [_heads(part, source[part], groups, size, device) for part in (of_heads, of_groups)]
            for source in (dict(_parts(target, block)), dict(_parts(layer, block)))
        ]
        norms = [torch.cat(both, dim=1).flatten(1).norm(dim=1) for both in pair]
        scale = (norms[0].unsqueeze(1) * norms[1]).clamp_min(torch.finfo(norms[0].dtype).tiny)
        heads, shared = (_products(below, above) for below, above in zip(*pair, strict=True))
        heads /= scale[..., None, None, None, None]
        products.append((heads, shared[:, :, 0, 0] / scale[..., None, None]))
    rotations = [rotation for *_, rotation in turns_of]

    order = torch.arange(per, device=device).expand(groups, groups, per)
    if per > 1:  # each head's own best rotation, to begin with
        alone = [_trace(_best(heads, r), heads) for (heads, _), r in zip(products, rotations, strict=True)]
        order = _pair_heads(alone[0] + alone[1])
    for _ in range(TURNS):
        turns = [_best(s + _chosen(h, order), r) for (h, s), r in zip(products, rotations, strict=True)]
        gains = [_trace(turn[:, :, None, None], h) for turn, (h, _) in zip(turns, products, strict=True)]
        last, order = order, _pair_heads(gains[0] + gains[1])
        if torch.equal(order, last):
            break
    shared_gains = [_trace(turn, s) for turn, (_, s) in zip(turns, products, strict=True)]
    head_gains = (gains[0] + gains[1]).gather(3, order.unsqueeze(3)).sum(dim=(2, 3))
    partner = assign(shared_gains[0] + shared_gains[1] + head_gains)
    each = torch.arange(groups)
    heads_of = partner.unsqueeze(1) * per + order.cpu()[each, partner]
    query, value = (turn[each.to(device), partner.to(device)].cpu() for turn in turns)
    return HeadMap(heads_of.flatten(), query, value)


def _parts(layer: Layer, block: Block) -> list[tuple[Part, Tensor]]:
    """The matrices of a layer, projection by projection."""
    return [one for name in block.matrices for one in pieces(block.parts[name], layer[name])]


def _rows(part: Part, tensor: Tensor, device: str) -> Tensor:
    return rows_first(part, tensor).to(device, working_dtype(tensor.dtype))


def _heads(part: Part, tensor: Tensor, groups: int, size: int, device: str) -> Tensor:
    """(groups, heads of the part in a group, size, width)."""
    rows = _rows(part, tensor, device)
    return rows.reshape(groups, -1, size, rows.shape[1])


def _products(below: Tensor, above: Tensor) -> Tensor:
    """(groups, heads, size, width) twice to above · belowᵀ of every two heads: (g below, g above, a, b, s, s)."""
    groups, per, size, width = below.shape
    product = above.reshape(-1, width) @ below.reshape(-1, width).T
    return product.view(groups, per, size, groups, per, size).permute(3, 0, 4, 1, 2, 5).double()


def _best(products: Tensor, rotation: Rotation) -> Tensor:
    """The allowed rotation R with the largest tr(R · product), for each of (…, s, s) float64."""
    size = products.shape[-1]
    if rotation == "any":
        u, _, vh = torch.linalg.svd(products)
        best: Tensor = vh.mT @ u.mT
        return best
    best = torch.eye(size, dtype=products.dtype, device=products.device).expand_as(products)
    if rotation == "planes":
        # Rows j and j + s/2 as one complex row; e^{iθ} = conj(c)/|c| for the inner product c.
        half = size // 2
        own = products.diagonal(dim1=-2, dim2=-1)
        real = own[..., :half] + own[..., half:]
        imaginary = products.diagonal(-half, -2, -1) - products.diagonal(half, -2, -1)
        length = torch.hypot(real, imaginary)
        cosine = torch.where(length > 0, real / length, 1.0)
        sine = torch.where(length > 0, -imaginary / length, 0.0)
        best = torch.diag_embed(cosine.repeat(*[1] * (cosine.ndim - 1), 2))
        best += torch.diag_embed(sine, -half) - torch.diag_embed(sine, half)
    return best


def _trace(turn: Tensor, products: Tensor) -> Tensor:
    """tr(R · product): (…, s, s) twice to (…)."""
    return (turn.mT * products).sum(dim=(-2, -1))


def _chosen(heads: Tensor, order: Tensor) -> Tensor:
    """Sums of the products of paired heads: (g, g, a, b, s, s) and (g, g, a) to (g, g, s, s)."""
    index = order[..., None, None, None].expand(*order.shape, 1, *heads.shape[-2:])
    return heads.gather(3, index).sum(dim=(2, 3))


def _pair_heads(values: Tensor) -> Tensor:
    """The best pairing of the heads in every two groups: (g, g, a, b) to (g, g, a)."""
    groups, _, per, _ = values.shape
    if per == 1:
        return torch.zeros(groups, groups, 1, dtype=torch.int64, device=values.device)
    pairs = [assign(one) for one in values.reshape(-1, per, per)]
    return torch.stack(pairs).view(groups, groups, per).to(values.device)
