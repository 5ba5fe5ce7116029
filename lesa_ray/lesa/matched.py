"""How near does a layer come to another after the best matching, and how near would a random one come?

Cosine and R² of weights mean little between layers whose neurons and heads are in orders of their own, so a candidate
is first moved to where it is most like the true block, without changing its function (`lesa_ray.lesa.alignment`). That
lifts the figures of any candidate, a random one's too: on a small real encoder to a cosine of 0.13 for plain noise and
0.17 for noise with the true layer's covariance on the residual side, where copies of a neighbour had 0.25. So a random
block is always scored beside, matched in the same way, and only the excess over it counts.

R² = 1 − ‖W − Ŵ‖²/‖W‖², over all matrices of the block as one long vector, and for each matrix: 0 is predicting zero.
Biases and norms are not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_ray.checkpoint.blocks import Block
from lesa_ray.lesa.alignment import Layer, align, move
from lesa_ray.lesa.cost import EXACT
from lesa_ray.lesa.streams import generator_for, row_blocks, working_dtype
from lesa_ray.lesa.symmetry import rows_first


@dataclass(frozen=True)
class Likeness:
    """Of two sets of weights, each as one long vector. None where one is zero."""

    cosine: float | None
    r2: float | None


@dataclass(frozen=True)
class MatchScore:
    """One candidate beside the true block."""

    matched: Likeness
    """After the best matching, over all matrices."""
    as_it_is: Likeness
    """Number by number."""
    matched_types: dict[str, Likeness]
    """By weight type."""
    types: dict[str, Likeness]
    """By weight type, number by number."""


@torch.no_grad()
def matched_scores(
    lower: Layer,
    true: Layer,
    upper: Layer,
    block: Block,
    *,
    predicted: Mapping[str, Layer] | None = None,
    seed: int = 0,
    device: str = "cpu",
    exact: int = EXACT,
) -> dict[str, MatchScore]:
    """Candidates for the middle one of three consecutive layers, scored against it.

    lower, true, upper: the matrices of `block` in layers i−1, i, i+1, (out_features, in_features), any float type.
    predicted: further candidates by name, made without a look at `true`.
    Returns scores by name: `lower` and `upper` (a copy of that neighbour), `mean` (number by number), `aligned mean`
    (the mean after `upper` was moved to `lower`), those of `predicted`, and `random` (see `random_like`), which the
    others have to exceed.
    """
    moved = move(upper, block, align(lower, upper, block, device=device, exact=exact))
    candidates: dict[str, Layer] = {
        "lower": lower,
        "upper": upper,
        "mean": _mean(lower, upper, block),
        "aligned mean": _mean(lower, moved, block),
        **(predicted or {}),
        "random": random_like(true, block, seed),
    }
    return {name: match(candidate, true, block, device=device, exact=exact) for name, candidate in candidates.items()}


def neighbour_scores(
    below: Layer, above: Layer, block: Block, *, seed: int = 0, device: str = "cpu", exact: int = EXACT
) -> dict[str, MatchScore]:
    """How like two layers are: `neighbour`, the one above moved to the one below, and `random`, chance."""
    return {
        "neighbour": match(above, below, block, device=device, exact=exact),
        "random": match(random_like(below, block, seed), below, block, device=device, exact=exact),
    }


@torch.no_grad()
def match(candidate: Layer, true: Layer, block: Block, *, device: str = "cpu", exact: int = EXACT) -> MatchScore:
    """Move `candidate` to where it is most like `true`, and score it there and as it is."""
    moved = move(candidate, block, align(true, candidate, block, device=device, exact=exact))
    return MatchScore(
        likeness(moved, true, block.matrices),
        likeness(candidate, true, block.matrices),
        {name: likeness(moved, true, [name]) for name in block.matrices},
        {name: likeness(candidate, true, [name]) for name in block.matrices},
    )


def likeness(candidate: Layer, true: Layer, names: Iterable[str]) -> Likeness:
    """Of the tensors `names` as one long vector. Products of rows are float32 (float64 if the weights are), their sums
    float64."""
    dot = own = target = 0.0
    for name in names:
        dtype = working_dtype(true[name].dtype)
        a, b = candidate[name].to(dtype), true[name].to(candidate[name].device, dtype)
        dot += float(torch.linalg.vecdot(a, b).double().sum())
        own += float(torch.linalg.vecdot(a, a).double().sum())
        target += float(torch.linalg.vecdot(b, b).double().sum())
    cosine = dot / (own * target) ** 0.5 if own > 0 and target > 0 else None
    return Likeness(cosine, (2 * dot - own) / target if target > 0 else None)


@torch.no_grad()
def random_like(layer: Layer, block: Block, seed: int) -> dict[str, Tensor]:
    """Random matrices with the second moments that `layer`'s have on the residual side, in float32 (float64 if they
    are): each neuron or head row is a random sum of all of them, so nothing is left of any one. Seeded per matrix."""
    made = {}
    for name in block.matrices:
        part, weight = block.parts[name], layer[name]
        rows = rows_first(part, weight).to(working_dtype(weight.dtype))
        generator = generator_for(seed, "random layer", name)
        mixed = torch.empty_like(rows)
        for some in row_blocks(len(rows)):
            noise = torch.randn(some.stop - some.start, len(rows), generator=generator, dtype=rows.dtype)
            mixed[some] = (noise @ rows.cpu()) / len(rows) ** 0.5
        made[name] = (mixed.T if part in ("o", "down") else mixed).contiguous()
    return made


def _mean(lower: Layer, upper: Layer, block: Block) -> dict[str, Tensor]:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(working_dtype(tensor.dtype))

    return {name: (wide(lower[name]) + wide(upper[name])) / 2 for name in block.matrices}
