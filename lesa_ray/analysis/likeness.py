"""How like neighbouring layers are once their neurons and heads are matched, and how like a random layer would be.

One piece of work is a block (attention or MLP) over all layers: matrices of a block move together, so they are matched
together (`lesa.matched`). Three layers are held at a time. Beside every figure stands that of a random
layer matched in the same way; what does not exceed it is chance.

Of a grown model old layers alone are scored: neighbours that are both old, and for candidates each old layer between
the old ones below and above it. A new layer is what some method made of its neighbours: a copy is a copy, and LESA's
have hardly more than one direction, so neither its likeness nor chance beside it says anything of the model.

Of two layers that differ in width the narrower is padded with neurons and heads of zeros, so that each of its own is
paired with one of the wider. Candidates are not scored then: whether they have the true layer's width or their
neighbour's would count for more than what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from lesa_ray.checkpoint.blocks import Block
from lesa_ray.lesa.alignment import Layer
from lesa_ray.lesa.fit import evenly
from lesa_ray.lesa.matched import MatchScore, matched_scores, neighbour_scores
from lesa_ray.lesa.streams import seed_for

Evened = Callable[[int, Layer, Layer], tuple[Layer, Layer, Block]]
"""Layer i and the matrices of layers i−1 and i → both at the wider one's width, and the block of that width."""
TRIPLES = 4
"""Middle layers, spread from the bottom to the top, for which candidates are scored: six matchings each."""


@dataclass(frozen=True)
class BlockFigures:
    """By weight type of one block."""

    neighbours: dict[str, list[float | None]]
    """Cosine of layers i and i+1 after the best matching (L−1); None where one of them is new, or zero."""
    chance: dict[str, list[float | None]]
    """The same of layer i and a random layer like layer i+1 (`lesa.matched.random_like`)."""
    candidates: dict[str, dict[str, dict[str, float | None]]]
    """Means over `TRIPLES` middle layers of cosine and R² of a candidate to the true layer after the best matching:
    copies of the `lower` and `upper` neighbour, their `mean` and `aligned mean`, and `random`. Empty below three old
    layers, and where layers differ in width."""


def match_block(
    load: Callable[[int], Layer],
    layers: int,
    block: Block,
    seed: int,
    *,
    new: Collection[int] = (),
    evened: Evened | None = None,
    device: str = "cpu",
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> BlockFigures:
    """load: layer → the block's matrices (out_features, in_features) by weight type, each old layer once, in order.
    new: layers that were put in. evened: where old layers differ in width."""
    neighbours: dict[str, list[float | None]] = {name: [] for name in block.matrices}
    chance: dict[str, list[float | None]] = {name: [] for name in block.matrices}
    triples: list[dict[str, MatchScore]] = []
    old = [layer for layer in range(layers) if layer not in new]
    middles = set(evenly(old[1:-1], TRIPLES)) if evened is None else set()
    before: list[tuple[int, Layer]] = []  # the old layers that came last, two at most
    for i in range(layers):
        progress("matching layers", i / layers)
        above = None if i in new else load(i)
        scores: dict[str, MatchScore] = {}
        if above is not None and before and before[-1][0] == i - 1:
            of_pair = seed_for(seed, "neighbours", i)
            pair = (before[-1][1], above, block) if evened is None else evened(i, before[-1][1], above)
            scores = neighbour_scores(*pair, seed=of_pair, device=device)
        for name in block.matrices if i else ():
            neighbours[name].append(scores["neighbour"].matched_types[name].cosine if scores else None)
            chance[name].append(scores["random"].matched_types[name].cosine if scores else None)
        if above is None:
            continue
        if len(before) == 2 and before[1][0] in middles:
            (_, lower), (_, true) = before
            one = matched_scores(lower, true, above, block, seed=seed_for(seed, "triple", i), device=device)
            triples.append(one)
        before = [*before[-1:], (i, above)]
    return BlockFigures(neighbours, chance, {name: _candidates(triples, name) for name in block.matrices})


def _candidates(triples: list[dict[str, MatchScore]], name: str) -> dict[str, dict[str, float | None]]:
    """Means over the triples; None where one has no value."""

    def mean(values: list[Any]) -> float | None:
        return None if None in values else sum(values) / len(values)

    kinds = list(triples[0]) if triples else []
    found = {kind: [asdict(one[kind].matched_types[name]) for one in triples] for kind in kinds}
    return {kind: {key: mean([one[key] for one in each]) for key in each[0]} for kind, each in found.items()}
