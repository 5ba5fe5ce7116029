"""How near does a layer come to another after the best matching, and how near would a random one come?

Cosine and R² of weights mean little between layers whose neurons and heads are in orders of their own, so a candidate
is first moved to where it is most like the true block, without changing its function (`lesa_ray.lesa.alignment`). That
lifts the figures of any candidate, a random one's too, all the more where few rows lie in a wide stream. So a random
block is always scored beside, matched in the same way (`random_like` the layers that the candidate comes from), and
only the excess over it counts.

R² = 1 − ‖W − Ŵ‖²/‖W‖², over all matrices of the block as one long vector, and for each matrix: 0 is predicting zero.
Biases and norms are not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_ray.checkpoint.blocks import Block, Fused, pieces
from lesa_ray.lesa.alignment import Layer, align, move
from lesa_ray.lesa.bounds import EXACT
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
    (the mean after `upper` was moved to `lower`), those of `predicted`, and `random` (`random_like` both neighbours),
    which the others have to exceed.
    """
    moved = move(upper, block, align(lower, upper, block, device=device, exact=exact))
    candidates: dict[str, Layer] = {
        "lower": lower,
        "upper": upper,
        "mean": _mean(lower, upper, block),
        "aligned mean": _mean(lower, moved, block),
        **(predicted or {}),
        "random": random_like([lower, upper], block, seed),
    }
    return {name: match(candidate, true, block, device=device, exact=exact) for name, candidate in candidates.items()}


def neighbour_scores(
    below: Layer, above: Layer, block: Block, *, seed: int = 0, device: str = "cpu", exact: int = EXACT
) -> dict[str, MatchScore]:
    """How like two layers are: `neighbour`, the one above moved to the one below, and `random`, one that is
    `random_like` the one above."""
    return {
        "neighbour": match(above, below, block, device=device, exact=exact),
        "random": match(random_like([above], block, seed), below, block, device=device, exact=exact),
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
def random_like(layers: Sequence[Layer], block: Block, seed: int) -> dict[str, Tensor]:
    """A layer as `layers` could have been, by chance: in float32 (float64 if they are), seeded per matrix.

    Rows (neurons, dimensions of heads) are drawn anew from the distribution that those of `layers` come from, as far as
    its second moments tell: which directions of the residual stream they use, and how much. To be given the layers that
    a candidate was made from, never the one it is compared with. Then what the candidate has above it is owed to its
    rows being those of the true layer, and what both have, to directions that all layers share.

    The distribution is estimated, not copied. With n rows in d dimensions their own second moments S have rank n at
    most, so mixtures of the rows lie in the space of these very rows; where one head has all of them, a random layer
    mixed from a layer is that layer up to a turn and scores 0.85 = 8/3π. So what of S cannot be told from noise is left
    out: S → (1−λ)·S + λ·diag(S), with λ of Ledoit and Wolf ("A well-conditioned estimator for large-dimensional
    covariance matrices", 2004) once all channels have one size. A draw from it is √(1−λ) times a mixture of the rows
    and √λ times noise of each channel's size. Rows that are zero in all `layers` (what a narrower one is padded with)
    belong to no distribution, and stay zero.

    Measured on the six-layer MiniLM encoder, attention / MLP: a copy of the lower neighbour 0.360 / 0.247 after the
    best matching, a layer mixed from the true one's rows 0.306 / 0.163 (its values 0.345, above the neighbour's 0.321),
    this one 0.222 / 0.141; the mean of two of these, matched to each other, 0.232 / 0.144, so that one yardstick serves
    means too.
    """
    made = {}
    for name in block.matrices:
        role, generator = block.parts[name], generator_for(seed, "random layer", name)
        drawn = []
        for parts in zip(*(pieces(role, layer[name]) for layer in layers), strict=True):
            part = parts[0][0]
            rows = [rows_first(part, tensor).to("cpu", working_dtype(tensor.dtype)) for _, tensor in parts]
            there = torch.stack([one.any(dim=1) for one in rows])
            some = torch.zeros_like(rows[0])
            if (used := there.any(dim=0)).any():
                some[used] = _drawn(torch.cat(rows)[there.flatten()], int(used.sum()), generator)
            drawn.append(some.T.contiguous() if part in ("o", "down") else some)
        made[name] = role.joined(drawn) if isinstance(role, Fused) else drawn[0]
    return made


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, d) from the distribution of rows (n, d)."""
    size = rows.square().mean(dim=0).sqrt()
    given_up = shrinkage(rows / size.clamp_min(torch.finfo(size.dtype).tiny))
    kept = ((1 - given_up) / len(rows)) ** 0.5
    drawn = torch.empty(count, len(size), dtype=rows.dtype)
    for some in row_blocks(count):
        many = some.stop - some.start
        mixing = torch.randn(many, len(rows), generator=generator, dtype=rows.dtype)
        noise = torch.randn(many, len(size), generator=generator, dtype=rows.dtype)
        drawn[some] = kept * (mixing @ rows) + given_up**0.5 * size * noise
    return drawn


def shrinkage(rows: Tensor) -> float:
    """Ledoit's and Wolf's λ, 0 … 1: how much of the second moments of rows (n, d), mean zero, is to be given up for a
    multiple of the identity. 1 where there is nothing to tell from noise."""
    n, d = rows.shape
    small = rows if n < d else rows.T  # n²‖S‖² is the square norm of either Gram matrix
    energy = sum(float((small[some] @ small.T).double().square().sum()) for some in row_blocks(len(small)))
    lengths = rows.square().sum(dim=1).double()
    off_target = energy - float(lengths.sum()) ** 2 / d
    noise = float(lengths.square().sum()) - energy / n
    return min(1.0, max(0.0, noise / off_target)) if off_target > 0 else 1.0


def _mean(lower: Layer, upper: Layer, block: Block) -> dict[str, Tensor]:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(working_dtype(tensor.dtype))

    return {name: (wide(lower[name]) + wide(upper[name])) / 2 for name in block.matrices}
