"""What is known of a fit afterwards: the figures that go into the manifest, and how they are measured.

Measured in weight space without forming a weight: U is orthonormal, so ⟨W, Ŵ⟩ = ⟨ΣV, ΣV̂⟩ and ‖Ŵ‖ = ‖ΣV̂‖, row sums of
the coefficients weighted with Σ² (or what stands in its place, `Decomposition.multipliers`). R² = 1 − ‖W − Ŵ‖² / ‖W‖²
= (2⟨W, Ŵ⟩ − ‖Ŵ‖²) / ‖W‖², so predicting zero scores exactly 0, what a truncated basis cannot express counts as error,
and a negative value is worse than predicting zero. R² and cosine are taken over all triples of a set as one long
vector; the loss is the training loss, the mean over batches of each triple's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from lesa_ray.config import PredictorKind, SvdRoute
from lesa_ray.lesa.spectral import Decomposition
from lesa_ray.lesa.streams import row_blocks

Predict = Callable[[Tensor, Tensor], Tensor]
"""Coefficients of two layers, (r, d2) each → those of the layer between."""
Json = dict[str, object]


@dataclass(frozen=True)
class Score:
    """How well one predictor does on one set of triples."""

    loss: float
    r2: float | None
    cosine: float | None
    """None where nothing is predicted or nothing is to be: a zero matrix has no direction."""


@dataclass(frozen=True)
class FitReport:
    """Figures of one weight type. `to_dict` holds only what the same inputs always give; `seconds` is apart."""

    d1: int
    d2: int
    layers: int
    checkpoints: int
    members: int
    """Matrices of a layer that share the basis and the predictor: 1, or the experts of a kind."""
    predictor: PredictorKind
    """What made the new layers; its figures are those of `predictor` below."""
    rank: int
    route: SvdRoute
    captured: float
    """Share of the base's energy in the basis; 1 − captured is the squared relative error of the decomposition."""
    sigma_max: float
    sigma_min: float
    triples_trained: int
    triples_scored: int
    """Of those trained on, spread evenly over them: the ones that `trained` is about."""
    triples_held_out: int
    rows_trained: int
    rows_held_out: int
    train_loss: tuple[float, ...]
    """Mean batch loss of each epoch, measured before each step as in the released code; none for ridge."""
    trained: dict[str, Score]
    """Scores on training triples: predictor, zero, mean and, unless skipped, ridge."""
    held_out: dict[str, Score] | None
    """Scores on the held-out triples; None if there are none."""
    ridge_skipped: str | None
    """Why ridge is not among the yardsticks."""
    norm_ratio: float | None
    """Mean over slots of ‖Ŵ‖ / mean(‖W_lower‖, ‖W_upper‖); None without slots."""
    seconds: dict[str, float] = field(compare=False)
    """Wall-clock by phase: load (waiting for layers), those of the spectral route, train, yardsticks, predict."""

    def to_dict(self) -> Json:
        """Plain finite JSON values; the same for the same inputs, settings and threads."""
        values = asdict(self)
        del values["seconds"]
        values["train_loss"] = list(self.train_loss)
        return values


def score(
    predictors: dict[str, Predict],
    decomposition: Decomposition,
    coefficients: Tensor,
    middles: Sequence[int],
    norm_weight: float,
    batch_size: int,
    device: str,
) -> dict[str, Score]:
    """Scores of each predictor on the triples (m−1, m, m+1), m in `middles`, of coefficients (layers, r, d2)."""
    sums = {name: _Sums() for name in predictors}
    weights = decomposition.multipliers.square().to(device)
    squares = decomposition.squares.flatten()
    for m in middles:
        true = torch.empty_like(weights)
        dots = {name: (torch.empty_like(weights), torch.empty_like(weights)) for name in predictors}
        for rows in row_blocks(len(weights)):
            lower, target, upper = (coefficients[i, rows].to(device) for i in (m - 1, m, m + 1))
            true[rows] = _row_dot(target, target)
            for name, predict in predictors.items():
                output = predict(lower, upper)
                dots[name][0][rows] = _row_dot(output, target)
                dots[name][1][rows] = _row_dot(output, output)
        for name, (dot, own) in dots.items():
            loss = _loss(own - 2 * dot + true, own, true, coefficients.shape[2], norm_weight, batch_size)
            sums[name].add(loss, float(weights @ dot), float(weights @ own), float(squares[m]))
    return {name: total.score(len(middles)) for name, total in sums.items()}


@dataclass
class _Sums:
    loss: float = 0.0
    dot: float = 0.0
    own: float = 0.0
    target: float = 0.0

    def add(self, loss: float, dot: float, own: float, target: float) -> None:
        self.loss += loss
        self.dot += dot
        self.own += own
        self.target += target

    def score(self, triples: int) -> Score:
        r2 = (2 * self.dot - self.own) / self.target if self.target > 0 else None
        directed = self.own > 0 and self.target > 0
        cosine = self.dot / math.sqrt(self.own * self.target) if directed else None
        return Score(self.loss / triples, r2, cosine)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two (rows, d2): (rows,) float64."""
    dots: Tensor = torch.linalg.vecdot(a, b)
    return dots.double()


def _loss(error: Tensor, own: Tensor, target: Tensor, d2: int, norm_weight: float, batch_size: int) -> float:
    """Mean training loss over batches of consecutive rows, from the rows' squared norms (rows,) each."""
    gap = _batch_norms(own, batch_size) - _batch_norms(target, batch_size)
    return float((1 - norm_weight) * error.mean() / d2 + norm_weight * gap.square().mean())


def _batch_norms(squares: Tensor, batch_size: int) -> Tensor:
    """Norms of batches of consecutive rows, from the rows' squared norms (rows,): (batches,)."""
    padded = torch.nn.functional.pad(squares, (0, -len(squares) % batch_size))
    return padded.view(-1, batch_size).sum(1).sqrt()
