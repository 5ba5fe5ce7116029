"""How like neighbouring layers are once their neurons and heads are matched, and how like a random layer would be.

One piece of work is a block (attention or MLP) over all layers: matrices of a block move together, so they are matched
together (`lesa.matched`). Three consecutive layers are held at a time. Beside every figure stands that of a random
layer matched in the same way; what does not exceed it is chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lesa_ray.checkpoint.blocks import Block
from lesa_ray.lesa.alignment import Layer
from lesa_ray.lesa.fit import evenly
from lesa_ray.lesa.matched import MatchScore, matched_scores, neighbour_scores
from lesa_ray.lesa.streams import seed_for

TRIPLES = 4
"""Middle layers, spread from the bottom to the top, for which candidates are scored: six matchings each."""


@dataclass(frozen=True)
class BlockFigures:
    """By weight type of one block."""

    neighbours: dict[str, list[float | None]]
    """Cosine of layers i and i+1 after the best matching (L−1)."""
    chance: dict[str, list[float | None]]
    """The same of layer i and a random layer with its second moments on the residual side."""
    candidates: dict[str, dict[str, dict[str, float | None]]]
    """Means over `TRIPLES` middle layers of cosine and R² of a candidate to the true layer after the best matching:
    copies of the `lower` and `upper` neighbour, their `mean` and `aligned mean`, and `random`. Empty below 3 layers."""


def match_block(
    load: Callable[[int], Layer],
    layers: int,
    block: Block,
    seed: int,
    *,
    device: str = "cpu",
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> BlockFigures:
    """load: layer → the block's matrices (out_features, in_features) by weight type, each layer once, in order."""
    neighbours: dict[str, list[float | None]] = {name: [] for name in block.matrices}
    chance: dict[str, list[float | None]] = {name: [] for name in block.matrices}
    triples: list[dict[str, MatchScore]] = []
    middles = set(evenly(range(1, layers - 1), TRIPLES))
    lower: Layer | None = None
    below: Layer | None = None
    for i in range(layers):
        progress("matching layers", i / layers)
        above = load(i)
        if below is not None:
            pair = neighbour_scores(below, above, block, seed=seed_for(seed, "neighbours", i), device=device)
            for name in block.matrices:
                neighbours[name].append(pair["neighbour"].matched_types[name].cosine)
                chance[name].append(pair["random"].matched_types[name].cosine)
        if lower is not None and below is not None and i - 1 in middles:
            one = matched_scores(lower, below, above, block, seed=seed_for(seed, "triple", i), device=device)
            triples.append(one)
        lower, below = below, above
    return BlockFigures(neighbours, chance, {name: _candidates(triples, name) for name in block.matrices})


def _candidates(triples: list[dict[str, MatchScore]], name: str) -> dict[str, dict[str, float | None]]:
    """Means over the triples; None where one has no value."""

    def mean(values: list[Any]) -> float | None:
        return None if None in values else sum(values) / len(values)

    kinds = list(triples[0]) if triples else []
    found = {kind: [asdict(one[kind].matched_types[name]) for one in triples] for kind in kinds}
    return {kind: {key: mean([one[key] for one in each]) for key in each[0]} for kind, each in found.items()}
