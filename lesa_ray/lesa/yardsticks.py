"""What G has to beat: predicting zero, the mean of the two neighbours, and ridge regression in closed form.

On small models G fits worse than predicting zero, and ridge better than G, so every fit is reported beside
them. Ridge solves (XᵀX + λ·m·I) B = XᵀY for X = [V_{i−1}, V_{i+1}], Y = V_i over the training triples, m the
mean of XᵀX's diagonal.

XᵀX and XᵀY consist of products of layers that are 0, 1 or 2 apart, and a layer's own product serves as lower
and as upper neighbour: computed once per layer, the work is 3·r·d2² multiplications per triple where forming
X would take 6·r·d2². Memory: (2·d2)² in float64 for the system, which bounds d2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-3
"""λ, relative to the mean of XᵀX's diagonal: small enough to fit what there is, large enough that two
identical layers or fewer rows than unknowns leave the system well conditioned (condition number at most 2·d2 / λ)."""
RIDGE_FEATURES_CPU = 8192
"""2·d2 up to which ridge is fitted on a CPU: at 8,192 the system takes 0.5 GB and about 200 GFLOP to solve."""
RIDGE_FEATURES_CUDA = 32768
"""The same on a GPU: 8.6 GB, twice while solving."""


def zero(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.zeros_like(lower)


def mean(lower: Tensor, upper: Tensor) -> Tensor:
    return (lower + upper) / 2


class Ridge:
    """Y ≈ lower · B_lower + upper · B_upper, both (d2, d2)."""

    def __init__(self, solution: Tensor) -> None:
        self.solution = solution

    def __call__(self, lower: Tensor, upper: Tensor) -> Tensor:
        """(rows, d2) twice → (rows, d2)."""
        d2 = self.solution.shape[1]
        return torch.addmm(lower @ self.solution[:d2], upper, self.solution[d2:])


def why_no_ridge(d2: int, device: str) -> str | None:
    """The reason for which ridge is left out, or None."""
    bound = RIDGE_FEATURES_CPU if torch.device(device).type == "cpu" else RIDGE_FEATURES_CUDA
    if 2 * d2 <= bound:
        return None
    return f"{2 * d2} features; ridge is fitted up to {bound} on this kind of device"


def fit_ridge(coefficients: Tensor, middles: Sequence[int], device: str) -> Ridge:
    """Ridge on the triples (m−1, m, m+1), m in `middles`, of coefficients (layers, r, d2)."""
    gram, cross = normal_equations(coefficients, middles, device)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)  # all-zero layers: any λ, the answer is zero
    factor = torch.linalg.cholesky(gram)
    return Ridge(torch.cholesky_solve(cross, factor).to(coefficients.dtype))


def normal_equations(coefficients: Tensor, middles: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """XᵀX (2·d2, 2·d2) and XᵀY (2·d2, d2) in float64, summed over layers of products in the coefficients'
    precision."""
    d2 = coefficients.shape[2]
    gram = torch.zeros(2 * d2, 2 * d2, dtype=torch.float64, device=device)
    cross = torch.zeros(2 * d2, d2, dtype=torch.float64, device=device)
    chosen = set(middles)

    def product(a: int, b: int) -> Tensor:  # V_aᵀ V_b: (d2, d2)
        return coefficients[a].to(device).T @ coefficients[b].to(device)

    for layer in sorted({m - 1 for m in chosen} | {m + 1 for m in chosen}):
        own = product(layer, layer)
        if layer + 1 in chosen:
            gram[:d2, :d2] += own
        if layer - 1 in chosen:
            gram[d2:, d2:] += own
    for m in sorted(chosen):
        gram[d2:, :d2] += product(m + 1, m - 1)
    for layer in sorted({m - 1 for m in chosen} | chosen):
        step = product(layer, layer + 1)
        if layer + 1 in chosen:
            cross[:d2] += step
        if layer in chosen:
            cross[d2:] += step.T
    gram[:d2, d2:] = gram[d2:, :d2].T
    return gram, cross
