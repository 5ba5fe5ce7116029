"""One weight type, from its layers to its figures.

    each layer: its norm, its singular values, its cosine with the layer below   one pass
    old layers: Σ and the leading coefficients in their common basis (`lesa.spectral`), the layers as points

The common basis takes at most `DIRECTIONS` directions, so that large types go through the streamed randomised route:
4 passes of products with a matrix of that width, in place of a Gram matrix of d1² and its eigenvectors (d1 = 14,336:
2·10¹³ operations that no GPU makes less of). For d1 up to 2,048 the Gram route is taken, which is exact.

Layers of several widths come padded with zeros to the widest, which leaves norms as they are; the singular values that
padding adds, zeros, are left out. The common basis and cosines are of the padded layers.

Of a grown model the common basis is that of the old layers alone: copies of a layer would count it twice, and what some
method made of its neighbours lies in their basis by construction. New layers have places in the picture.

Experts of a kind count as one type: side by side they are one matrix (d1, experts·d2) of each layer. Their order within
a layer is free, so the likeness of neighbouring layers says little of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lesa_ray.analysis import pictures
from lesa_ray.analysis.spectra import effective_rank, singular_values, stable_rank
from lesa_ray.lesa.clock import Clock
from lesa_ray.lesa.fit import evenly
from lesa_ray.lesa.spectral import Decomposition, decompose
from lesa_ray.lesa.streams import Layers, Load, only, square_norm, working_dtype

DIRECTIONS = 256
"""Of the common basis that are looked at."""
SPECTRUM = 64
"""Singular values that are kept of each layer, at fixed quantiles of their index."""
CAPTURED = (1, 4, 16, 64, 256)
"""Numbers of directions for which the captured share of the energy is told."""


@dataclass(frozen=True)
class TypeFigures:
    """Lists go over the layers (L), from the bottom, or over pairs of neighbours (L−1). A zero matrix has ranks 0, and
    no direction: its cosines are None. So is what is said of layers that do not have the type (`among`); of those there
    is no spectrum."""

    shape: list[int]
    """(d1, d2) of the matrix of a layer, the widest one's; of experts, side by side."""
    shapes: list[list[int]] | None
    """Of each layer, where they differ."""
    members: int
    """1, or the experts that lie side by side."""
    norms: list[float | None]
    """‖W_i‖_F."""
    effective_rank: list[float | None]
    stable_rank: list[float | None]
    spectrum_index: list[int]
    """Which singular values `spectra` holds, 0 the largest; of a narrower layer those at the same shares of its own."""
    spectra: list[list[float]]
    """Of each layer, descending."""
    common_spectrum: list[float]
    """The leading Σ of the old layers side by side, descending."""
    common_directions: int
    """How many there are in all: min(d1, old layers·d2)."""
    route: str
    """The spectral route of the common basis; `randomized` is approximate towards the end of `common_spectrum`."""
    captured: dict[str, float]
    """Share of the old layers' ‖W‖²_F that lies in so many leading directions."""
    neighbour_cosine: list[float | None]
    """⟨W_i, W_{i+1}⟩ / (‖W_i‖·‖W_{i+1}‖), in the coordinates of the files."""
    pictures: dict[str, Any]
    """The layers as points; `directions`: leading rows of V_i that make one."""


def analyse_type(
    load: Load,
    layers: int,
    *,
    new: Collection[int] = (),
    shapes: Sequence[tuple[int, int]] | None = None,
    members: int = 1,
    seed: int = 0,
    device: str = "cpu",
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    progress: Callable[[str, float], None] = lambda phase, share: None,
) -> TypeFigures:
    """load: layer → its matrix (d1, d2), called several times for each. new: layers that were put in; one at least was
    not. shapes: of each before it was padded.

    Raises: UserError for matrices that are not finite, or not of one shape.
    """
    source = Layers([load], layers, device)
    d1, d2 = source.shape
    spectra: list[Tensor] = []
    cosines: list[float | None] = []
    below: Tensor | None = None
    for _, i, weight in source.stream():
        progress("singular values", 0.7 * i / layers)
        values = singular_values(weight)
        spectra.append(values if shapes is None else values[: min(shapes[i])])
        if below is not None:
            cosines.append(cosine(below, weight))
        below = weight
    del below, weight
    progress("common basis", 0.7)
    old = [layer for layer in range(layers) if layer not in new]
    parts = decompose(
        [only(load, old)],
        len(old),
        rank=min(DIRECTIONS, d1, len(old) * d2),
        seed=seed,
        device=device,
        scratch_dir=scratch_dir,
        memory_budget=memory_budget,
        clock=Clock(),
    )
    progress("pictures", 0.95)
    leading = parts.coefficients[0, :, : pictures.DIRECTIONS].cpu()
    rows = leading.new_empty(layers, *leading.shape[1:])  # (L, directions, d2)
    rows[old] = leading
    for i in sorted(new):
        rows[i] = parts.project(load(i))[: pictures.DIRECTIONS].cpu()
    return TypeFigures(
        shape=[d1, d2],
        shapes=None if shapes is None else [list(shape) for shape in shapes],
        members=members,
        norms=list(source.squares[0].sqrt().tolist()),
        effective_rank=list(map(effective_rank, spectra)),
        stable_rank=list(map(stable_rank, spectra)),
        spectrum_index=evenly(range(min(d1, d2)), SPECTRUM),
        spectra=[values[evenly(range(len(values)), SPECTRUM)].tolist() for values in spectra],
        common_spectrum=parts.sigma.tolist(),
        common_directions=min(d1, len(old) * d2),
        route=parts.route,
        captured=captured(parts),
        neighbour_cosine=cosines,
        pictures={**asdict(pictures.draw(rows.flatten(1), new)), "directions": rows.shape[1]},
    )


def among(figures: TypeFigures, layers: Sequence[int], depth: int) -> TypeFigures:
    """Figures of `layers` alone as figures of a model of `depth` layers."""
    if len(layers) == depth:
        return figures

    def spread(values: Sequence[Any], absent: Any = None) -> list[Any]:
        found = dict(zip(layers, values, strict=True))
        return [found.get(layer, absent) for layer in range(depth)]

    cosines = {
        one: value
        for (one, next_), value in zip(pairwise(layers), figures.neighbour_cosine, strict=True)
        if next_ == one + 1
    }
    drawn = {key: spread(points) for key in ("pca", "tsne") if (points := figures.pictures.get(key))}
    return replace(
        figures,
        norms=spread(figures.norms),
        effective_rank=spread(figures.effective_rank),
        stable_rank=spread(figures.stable_rank),
        spectra=spread(figures.spectra, []),
        neighbour_cosine=[cosines.get(layer) for layer in range(depth - 1)],
        pictures={**figures.pictures, **drawn},
    )


def captured(parts: Decomposition, counts: Sequence[int] = CAPTURED) -> dict[str, float]:
    """Shares of the energy of the basis's layers in the leading directions; 1 for layers that are all zero."""
    total, directions = float(parts.squares.sum()), len(parts.sigma)
    shares = parts.sigma.square().cumsum(0) / total if total > 0 else torch.ones(directions, dtype=torch.float64)
    kept = [count for count in counts if count <= directions] or [directions]
    return {str(count): min(float(shares[count - 1]), 1.0) for count in kept}


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Of two matrices (d1, d2) as long vectors; None if one is zero."""
    norms = math.sqrt(square_norm(one) * square_norm(other))
    rows = torch.linalg.vecdot(one.to(working_dtype(one.dtype)), other.to(working_dtype(other.dtype)))
    return float(rows.double().sum()) / norms if norms > 0 else None
