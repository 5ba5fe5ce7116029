"""The layers of a weight type as points in a plane: LESA's picture of their continuity (arXiv 2502.13794, section 3).

A layer's point is its leading coefficients: the rows of V_i that belong to the largest singular values of the old
layers together, as one long vector. The paper does not say how many rows its figure takes; `DIRECTIONS` are taken here.

PCA keeps large distances and says how much of the whole the plane shows. t-SNE (van der Maaten, Hinton 2008) keeps
who is near whom; distances between far points mean nothing in it, nor does the size of a cluster. Both start from the
L × L matrix of inner products, so nothing is as large as a weight: Q·√Λ of it has the same distances between layers.

Of a grown model the principal components are those of the old layers, on which the new ones are projected: copies would
turn the axes towards what they are copies of. t-SNE projects nothing, so new layers take part in it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = 16
"""Leading rows of V_i that make a layer's point."""
TSNE_LAYERS = 6
"""With fewer layers there are no neighbourhoods to keep."""
LARGEST_PERPLEXITY = 30.0
"""scikit-learn's default, for hundreds of points."""
_SEED = 0


@dataclass(frozen=True)
class Picture:
    """Coordinates of each layer in two planes."""

    pca: list[list[float]]
    pca_share: list[float]
    """Share of the old layers' variance that lies along each of the two axes; 0 where all are the same."""
    tsne: list[list[float]] | None
    tsne_perplexity: float | None
    tsne_missing: str | None
    """Why there is no t-SNE."""


def draw(points: Tensor, new: Collection[int] = ()) -> Picture:
    """Of points (L, n), float; `new` are those of layers that were put in. The same points give the same picture."""
    coordinates, shares = principal(points, new)
    perplexity = suited_perplexity(len(points))
    tsne, missing = None, None
    if len(points) < TSNE_LAYERS:
        missing = f"{len(points)} layers are too few for t-SNE; it takes {TSNE_LAYERS}"
    elif not bool((whole := principal(points)[0] if new else coordinates).any()):
        missing = "all layers have the same coefficients"
    else:
        tsne, missing = _tsne(whole, perplexity)
    plane = torch.nn.functional.pad(coordinates, (0, 2))[:, :2]
    axes = torch.nn.functional.pad(shares, (0, 2))[:2]
    return Picture(plane.tolist(), axes.tolist(), tsne, None if tsne is None else perplexity, missing)


def principal(points: Tensor, new: Collection[int] = ()) -> tuple[Tensor, Tensor]:
    """Principal components of the old ones of points (L, n): coordinates (L, old) of all along them, the largest first,
    the old ones' at the same distances from one another as the points, and each one's share of their variance (old,);
    float64 on the CPU.

    The sign of an axis is free; here the old ones' coordinate of largest magnitude is positive.
    """
    old = [at for at in range(len(points)) if at not in new]
    centred = points.cpu().double()
    centred -= centred[old].mean(0)
    products = centred @ centred[old].T
    values, vectors = torch.linalg.eigh(products[old])
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    values[values < len(old) * torch.finfo(values.dtype).eps * values[0]] = 0  # rounding: no axis
    vectors *= vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    coordinates = products @ vectors * torch.where(values > 0, values.rsqrt(), 0)
    coordinates[old] = vectors * values.sqrt()  # the same, without the rounding of a product
    total = values.sum()
    return coordinates, values / total if total > 0 else torch.zeros_like(values)


def suited_perplexity(layers: int) -> float:
    """About how many neighbours a layer has: a third of the others, between 2 and 30. scikit-learn wants fewer than
    there are points."""
    return min(max((layers - 1) / 3, 2.0), LARGEST_PERPLEXITY)


def _tsne(coordinates: Tensor, perplexity: float) -> tuple[list[list[float]] | None, str | None]:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None, "scikit-learn is not installed; pip install 'lesa-ray[report]'"
    model: Any = TSNE(perplexity=perplexity, init="pca", method="exact", random_state=_SEED)
    return model.fit_transform(coordinates.numpy()).tolist(), None
