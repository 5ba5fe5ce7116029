"""Ridge regression in closed form: the yardstick of every fit, and with `--predictor ridge` the predictor itself.

It solves (XᵀX + λ·m·I) B = XᵀY for X = [V_{i−1}, V_{i+1}], Y = V_i over the training triples, m the mean of XᵀX's
diagonal. On the sizes of LESA's paper it fits as well as the network or better, without training.

XᵀX and XᵀY consist of products of layers that are 0, 1 or 2 apart. A layer's own product serves as lower and as upper
neighbour, and only the blocks on and below the diagonal are computed, so the work is 5·r·d2² operations a layer where
forming X takes 12·r·d2². Everything runs in the coefficients' precision, products added up inside the matrix product:
float32 is half the time and half the memory of float64 (measured at d2 = 2816, r = 1024 on one core: 0.33 s a layer,
0.55 s with sums in float64). Its rounding acts like noise of size eps·‖XᵀX‖ on the penalty λ·m; where the noise could
come near the penalty (few directions hold most of the energy, or λ is tiny) all is done again in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lesa_ray.errors import UserError
from lesa_ray.lesa.cost import RIDGE_BLOCK, RIDGE_FEATURES

NOISE = 8
"""float32 serves while λ·m is at least this many times eps·‖XᵀX‖_F, a generous bound of Cholesky's backward error:
where the energy is spread over n directions, ‖XᵀX‖_F is about √n times the norm that counts."""


class Ridge:
    """Y ≈ lower · B_lower + upper · B_upper, both (d2, d2)."""

    def __init__(self, solution: Tensor) -> None:
        self.solution = solution

    def __call__(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Coefficients of the layer between two: (rows, d2) each, on any device, to (rows, d2) on the solution's."""
        d2 = self.solution.shape[1]
        first = lower.to(self.solution) @ self.solution[:d2]
        return first.addmm_(upper.to(self.solution), self.solution[d2:])


def why_no_ridge(d2: int, device: str) -> str | None:
    """The reason for which ridge is left out, or None."""
    bound = RIDGE_FEATURES[torch.device(device).type]
    if 2 * d2 <= bound:
        return None
    return f"{2 * d2} features; ridge is fitted up to {bound} on this kind of device"


def require_ridge(what: str, d2: int, device: str) -> None:
    """Raises: UserError where ridge is to be the predictor and its system is too large."""
    if (reason := why_no_ridge(d2, device)) is not None:
        raise UserError(f"{what}: predictor ridge: {reason}; use predictor mlp")


def fit_ridge(coefficients: Tensor, middles: Sequence[int], penalty: float, device: str) -> Ridge:
    """Ridge with λ = `penalty` on the triples (m−1, m, m+1), m in `middles`, of coefficients (layers, r, d2)."""
    gram, cross = normal_equations(coefficients, middles, device)
    if not _well_conditioned(gram, penalty):
        del gram, cross  # before their like in float64 is made
        gram, cross = normal_equations(coefficients, middles, device, torch.float64)
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()) or 1.0)  # all-zero layers: any λ, the answer is zero
    cholesky_(gram)
    solve_(gram, cross)
    del gram
    return Ridge(cross.to(coefficients.dtype))


def cholesky_(a: Tensor) -> Tensor:
    """A = L Lᵀ: the lower triangle of a positive definite A (n, n) becomes that of L, in A's own memory.

    By blocks, right-looking (Golub, Van Loan, section 4.2.5). torch's own needs A and L beside each other, and a third
    such matrix to solve with: at 5,632 features three times 127 MB."""
    n = len(a)
    for at in range(0, n, RIDGE_BLOCK):
        end = min(at + RIDGE_BLOCK, n)
        corner = torch.linalg.cholesky(a[at:end, at:end])
        a[at:end, at:end] = corner
        a[end:, at:end] = torch.linalg.solve_triangular(corner.mT, a[end:, at:end], upper=True, left=False)
        for row in range(end, n, RIDGE_BLOCK):
            stop = min(row + RIDGE_BLOCK, n)
            a[row:stop, end:stop].addmm_(a[row:stop, at:end], a[end:stop, at:end].mT, alpha=-1)
    return a


def solve_(factor: Tensor, b: Tensor) -> Tensor:
    """X of L Lᵀ X = B, in B's own memory: L in the lower triangle of `factor` (n, n), B (n, columns)."""
    n = len(factor)
    blocks = [(at, min(at + RIDGE_BLOCK, n)) for at in range(0, n, RIDGE_BLOCK)]
    for at, end in blocks:  # L Y = B
        b[at:end].addmm_(factor[at:end, :at], b[:at], alpha=-1)
        b[at:end] = torch.linalg.solve_triangular(factor[at:end, at:end], b[at:end], upper=False)
    for at, end in reversed(blocks):  # Lᵀ X = Y
        b[at:end].addmm_(factor[end:, at:end].mT, b[end:], alpha=-1)
        b[at:end] = torch.linalg.solve_triangular(factor[at:end, at:end].mT, b[at:end], upper=True)
    return b


def _well_conditioned(gram: Tensor, penalty: float) -> bool:
    """Whether rounding in the system's precision is small beside λ·m."""
    largest = 2**0.5 * float(torch.linalg.vector_norm(gram))  # at least ‖XᵀX‖_F, of which the lower half is there
    return penalty * float(gram.diagonal().mean()) >= NOISE * torch.finfo(gram.dtype).eps * largest


def normal_equations(
    coefficients: Tensor, middles: Collection[int], device: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """XᵀX (2·d2, 2·d2), of which the lower triangle counts, and XᵀY (2·d2, d2), in `dtype` or the coefficients'."""
    d2 = coefficients.shape[2]
    dtype = dtype or coefficients.dtype
    gram = torch.zeros(2 * d2, 2 * d2, dtype=dtype, device=device)
    cross = torch.zeros(2 * d2, d2, dtype=dtype, device=device)
    trained = set(middles)
    lower, upper = {m - 1 for m in trained}, {m + 1 for m in trained}

    def layer(i: int) -> Tensor:
        return coefficients[i].to(device, dtype)

    def add_own(target: Tensor, layers: set[int]) -> None:  # V_iᵀ V_i
        for i in sorted(layers):
            v = layer(i)
            for at in range(0, d2, RIDGE_BLOCK):
                target[at : at + RIDGE_BLOCK, : at + RIDGE_BLOCK].addmm_(
                    v[:, at : at + RIDGE_BLOCK].T, v[:, : at + RIDGE_BLOCK]
                )

    def add_product(target: Tensor, pairs: set[tuple[int, int]]) -> None:  # V_aᵀ V_b
        for a, b in sorted(pairs):
            target.addmm_(layer(a).T, layer(b))

    # What both halves need comes first and is copied, so that no further buffer is held.
    first, second = gram[:d2, :d2], gram[d2:, d2:]
    add_own(first, lower & upper)
    second.copy_(first)
    add_own(first, lower - upper)
    add_own(second, upper - lower)
    add_product(gram[d2:, :d2], {(m + 1, m - 1) for m in trained})

    from_lower, from_upper = {(m - 1, m) for m in trained}, {(m, m + 1) for m in trained}
    add_product(cross[:d2], from_lower & from_upper)
    cross[d2:] = cross[:d2].T
    add_product(cross[:d2], from_lower - from_upper)
    add_product(cross[d2:], {(b, a) for a, b in from_upper - from_lower})
    return gram, cross
