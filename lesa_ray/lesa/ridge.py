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
from itertools import pairwise

import torch
from torch import Tensor

from lesa_ray.lesa.bounds import RIDGE_BLOCK, RIDGE_FEATURES

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
    """The reason for which ridge is left out as a yardstick, or None."""
    bound = RIDGE_FEATURES[torch.device(device).type]
    if 2 * d2 <= bound:
        return None
    return f"{2 * d2} features; it is a yardstick up to {bound} on this kind of device"


def fit_ridge(coefficients: Tensor, middles: Sequence[int], penalty: float, device: str) -> Ridge:
    """Ridge with λ = `penalty` on the triples (m−1, m, m+1), m in `middles`, of coefficients (layers, r, d2)."""
    gram, cross = normal_equations(coefficients, middles, device)
    if not _well_conditioned(gram, penalty):
        del gram, cross  # before their like in float64 is made
        gram, cross = normal_equations(coefficients, middles, device, torch.float64)
    mean = float(gram.diagonal().mean())
    gram.add_to_diagonal(penalty * mean or 1.0)  # all-zero layers: any λ, the answer is zero
    gram.factorise()
    gram.solve(cross)
    return Ridge(cross.to(coefficients.dtype))


class Lower:
    """A symmetric matrix (n, n) of which only blocks on and below the diagonal are held: rows [start, end) as a panel
    (end − start, end). What is made of it stays in its own memory; torch's own Cholesky needs the whole matrix, its
    factor, and as much again to solve with (at 5,632 features 127 MB each; here it is 66 MB in all)."""

    def __init__(self, edges: Sequence[int], dtype: torch.dtype, device: str) -> None:
        """edges: 0 … n, where panels begin and the last one ends."""
        self.panels = [
            (start, end, torch.zeros(end - start, end, dtype=dtype, device=device)) for start, end in pairwise(edges)
        ]

    def diagonal(self) -> Tensor:
        """(n,)."""
        return torch.cat([panel[:, start:].diagonal() for start, _, panel in self.panels])

    def add_to_diagonal(self, value: float) -> None:
        for start, _, panel in self.panels:
            panel[:, start:].diagonal().add_(value)

    def norm(self) -> float:
        """Frobenius norm of what is held: of the whole, at least 1/√2."""
        return float(torch.stack([torch.linalg.vector_norm(panel) for _, _, panel in self.panels]).norm())

    def factorise(self) -> None:
        """Cholesky, A = L Lᵀ: the lower triangle of L in place of A's, by rows of blocks, left-looking (Golub, Van
        Loan, section 4.2). Raises: torch.linalg.LinAlgError if A is not positive definite."""
        for at, (start, _, panel) in enumerate(self.panels):
            for left, right, above in self.panels[:at]:
                block = panel[:, left:right].addmm_(panel[:, :left], above[:, :left].mT, alpha=-1)
                block.copy_(torch.linalg.solve_triangular(above[:, left:].mT, block, upper=True, left=False))
            corner = panel[:, start:].addmm_(panel[:, :start], panel[:, :start].mT, alpha=-1)
            corner.copy_(torch.linalg.cholesky(corner))

    def solve(self, b: Tensor) -> None:
        """After `factorise`: X of A X = B in place of B (n, columns)."""
        for start, end, panel in self.panels:  # L Y = B
            b[start:end].addmm_(panel[:, :start], b[:start], alpha=-1)
            b[start:end] = torch.linalg.solve_triangular(panel[:, start:], b[start:end], upper=False)
        for start, end, panel in reversed(self.panels):  # Lᵀ X = Y
            b[start:end] = torch.linalg.solve_triangular(panel[:, start:].mT, b[start:end], upper=True)
            b[:start].addmm_(panel[:, :start].mT, b[start:end], alpha=-1)


def _well_conditioned(gram: Lower, penalty: float) -> bool:
    """Whether rounding in the system's precision is small beside λ·m."""
    diagonal = gram.diagonal()
    largest = 2**0.5 * gram.norm()  # at least ‖XᵀX‖_F, of which the lower half is there
    return penalty * float(diagonal.mean()) >= NOISE * torch.finfo(diagonal.dtype).eps * largest


def normal_equations(
    coefficients: Tensor, middles: Collection[int], device: str, dtype: torch.dtype | None = None
) -> tuple[Lower, Tensor]:
    """XᵀX (2·d2, 2·d2) and XᵀY (2·d2, d2), in `dtype` or the coefficients'."""
    d2 = coefficients.shape[2]
    dtype = dtype or coefficients.dtype
    starts = list(range(0, d2, RIDGE_BLOCK))
    gram = Lower([*starts, *(d2 + start for start in starts), 2 * d2], dtype, device)
    first, second = gram.panels[: len(starts)], gram.panels[len(starts) :]
    cross = torch.zeros(2 * d2, d2, dtype=dtype, device=device)
    trained = set(middles)
    lower, upper = {m - 1 for m in trained}, {m + 1 for m in trained}

    def layer(i: int) -> Tensor:
        return coefficients[i].to(device, dtype)

    def add_own(half: Sequence[tuple[int, int, Tensor]], layers: set[int]) -> None:  # V_iᵀ V_i
        before = half[0][0]
        for i in sorted(layers):
            v = layer(i)
            for start, end, panel in half:
                panel[:, before:].addmm_(v[:, start - before : end - before].T, v[:, : end - before])

    def add_product(target: Tensor, pairs: set[tuple[int, int]]) -> None:  # V_aᵀ V_b
        for a, b in sorted(pairs):
            target.addmm_(layer(a).T, layer(b))

    # What both halves need comes first and is copied, so that no further buffer is held.
    add_own(first, lower & upper)
    for (_, _, one), (_, _, other) in zip(first, second, strict=True):
        other[:, d2:] = one
    add_own(first, lower - upper)
    add_own(second, upper - lower)
    for m in sorted(trained):
        above, below = layer(m + 1), layer(m - 1)
        for start, end, panel in second:
            panel[:, :d2].addmm_(above[:, start - d2 : end - d2].T, below)

    from_lower, from_upper = {(m - 1, m) for m in trained}, {(m, m + 1) for m in trained}
    add_product(cross[:d2], from_lower & from_upper)
    cross[d2:] = cross[:d2].T
    add_product(cross[:d2], from_lower - from_upper)
    add_product(cross[d2:], {(b, a) for a, b in from_upper - from_lower})
    return gram, cross
