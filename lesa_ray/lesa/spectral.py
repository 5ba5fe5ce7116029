"""Step 1 of LESA: the basis U Σ that all layers of a weight type share, and each layer's coefficients V_i.

Put side by side, the L matrices W_i (d1, d2) of one weight type are W = [W_1 … W_L] = U Σ [V_1 … V_L] (arXiv
2502.13794, section 3). W is never built but in the route `exact`; the others stream the layers:

exact       torch.linalg.svd of W. The reference, for tests and small models; slower, all layers in memory.
gram        G = Σ W_i W_iᵀ = U Σ² Uᵀ, eigh in float64. Two passes over the layers; d1² · 8 bytes for G, four
            times that at the peak of eigh. With U orthonormal, U Uᵀ W_i = W_i whatever the error of Σ, so the
            full-rank reconstruction is as exact as U.
randomized  A random range finder with power iterations and a small Gram matrix on it (Halko, Martinsson,
            Tropp 2011, algorithms 4.4 and 5.1). 3 + power_iterations passes, (d1 + d2) · rank memory.
            Approximate: `captured` says how much of the energy ‖W‖² it found.
none        Identity basis, the weights are their own coefficients: the paper's ablation without SVD.

Squaring the matrix costs half the digits: in float64 a singular value of the Gram matrix is good to 1e-8 of
the largest, which is below what float32 weights hold. Singular values are then measured again as the norms of
the rows of UᵀW (a Rayleigh quotient, whose error is quadratic in that of U), and directions at rounding level
are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_ray.config import SvdRoute
from lesa_ray.errors import UserError
from lesa_ray.lesa.streams import Layers, Load, allocate, generator_for, square_norm, working_dtype

GRAM_MEMORY = 32 * 2**30
"""Bytes that G, its eigenvectors and eigh's workspace (4 · d1² doubles) may take in route `auto`: d1 up to 32,768."""
GRAM_ALWAYS = 2048
"""Up to this d1, eigh takes about two seconds on one core, and its exactness is worth more than a rank's saving."""
RANK_SHARE = 8
"""`randomized` does (2 + 2·power_iterations + 2) · d1 · rank multiplications per column, `gram` d1² + 2 · d1
· rank and the cubic eigh: with the default 2 iterations the first is cheaper from rank ≤ d1/8 on."""
GRAM_ROWS = 256
"""Rows of G summed at once; only blocks on and below the diagonal are computed, about half of the products."""


@dataclass(frozen=True)
class Decomposition:
    """Basis and coefficients of one weight type, in float32 (float64 if the weights are)."""

    route: SvdRoute
    left: Tensor | None
    """U: (d1, r), orthonormal columns, on the compute device; None is the identity (route `none`)."""
    sigma: Tensor
    """Σ: (r,) float64 on the CPU, descending but for rounding; ones in route `none`."""
    coefficients: Tensor
    """V: (checkpoints, L, r, d2) on the CPU, the base first."""
    squares: Tensor
    """‖W_i‖²_F: (checkpoints, L) float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d1, d2) of the weights."""
        rows = self.coefficients.shape[2] if self.left is None else self.left.shape[0]
        return rows, self.coefficients.shape[3]

    @property
    def captured(self) -> float:
        """Share of the base's energy ‖W‖²_F that lies in the basis; 1 − captured is the squared relative error."""
        if self.left is None:
            return 1.0
        total = float(self.squares[0].sum())
        return min(float(self.sigma.square().sum()) / total, 1.0) if total > 0 else 1.0

    def compose(self, coefficients: Tensor) -> Tensor:
        """W = U Σ V: coefficients (r, d2) to a weight (d1, d2) on the same device."""
        if self.left is None:
            return coefficients
        scaled = coefficients * self.sigma.to(coefficients).unsqueeze(1)
        return self.left.to(coefficients.device) @ scaled


def choose_route(d1: int, d2: int, layers: int, rank: int | None, memory: int = GRAM_MEMORY) -> SvdRoute:
    """The route that `auto` takes, from sizes alone, so that it is the same on every machine.

    Without a rank: `gram`; keeping every direction, it is the cheapest way there is. With a rank:
    `randomized` where G would not fit its bound, or where the rank is so small against a d1 so large that it
    saves time; else `gram`, which is exact. `exact` is never chosen: it gives the same to rounding, slower.
    """
    if rank is None or d1 <= GRAM_ALWAYS:
        return "gram"
    too_large = 4 * d1 * d1 * 8 > memory
    small_rank = rank * RANK_SHARE <= min(d1, layers * d2)
    return "randomized" if too_large or small_rank else "gram"


def decompose(
    loads: Sequence[Load],
    layers: int,
    *,
    svd: SvdRoute = "auto",
    rank: int | None = None,
    oversampling: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    device: str = "cpu",
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
) -> Decomposition:
    """Basis of the base checkpoint `loads[0]`, and in it the coefficients of every checkpoint of `loads`.

    Raises: UserError for weights that are not finite float matrices of one shape.
    """
    base = Layers(loads[0], layers)
    d1, d2 = base.shape
    dtype = working_dtype(base.dtype)
    route = choose_route(d1, d2, layers, rank) if svd == "auto" else svd
    keep = min(rank or d1, d1, layers * d2)
    left: Tensor | None = None
    if route == "none":
        if rank is not None:
            raise UserError(
                f"rank {rank} with svd none: without a decomposition there are no directions to choose from"
            )
        keep = d1
    elif route == "exact":
        left = _exact(base, device)[:, :keep]
    elif route == "gram":
        left = _leading(_gram(base, device), keep)
    else:
        left = _randomized(base, keep, oversampling, power_iterations, seed, device)
    if left is not None:
        left = _fix_signs(left).to(dtype).contiguous()

    coefficients = allocate((len(loads), layers, keep, d2), dtype, scratch_dir, memory_budget)
    squares = torch.empty(len(loads), layers, dtype=torch.float64)
    energy = torch.zeros(keep, dtype=torch.float64, device=device)
    for c, load in enumerate(loads):
        for i, weight in enumerate(base if c == 0 else Layers(load, layers, base.shape)):
            squares[c, i] = square_norm(weight)
            projected = weight.to(device, dtype) if left is None else left.T @ weight.to(device, dtype)
            if c == 0:
                energy += torch.linalg.vector_norm(projected, dim=1, dtype=torch.float64).square()
            coefficients[c, i] = projected
    if left is None:
        return Decomposition(route, None, torch.ones(keep, dtype=torch.float64), coefficients, squares)

    sigma = energy.sqrt().cpu()
    kept = sigma > _rounding(d1, layers * d2, dtype) * sigma.max()
    if not bool(kept.all()):
        # Directions at rounding level get no row of V: divided by their Σ, noise would become training rows.
        kept[0] = True  # all-zero weights keep one direction, whose coefficients are zero
        sigma, left = sigma[kept], left[:, kept.to(device)].contiguous()
        smaller = allocate((len(loads), layers, len(sigma), d2), dtype, scratch_dir, memory_budget)
        for target, source in zip(smaller.flatten(0, 1), coefficients.flatten(0, 1), strict=True):
            target.copy_(source[kept])
        coefficients = smaller
    divisor = sigma.clamp_min(torch.finfo(dtype).tiny).to(dtype).unsqueeze(1)
    for layer in coefficients.flatten(0, 1):
        layer.div_(divisor)
    return Decomposition(route, left, sigma, coefficients, squares)


def _rounding(d1: int, columns: int, dtype: torch.dtype) -> float:
    """Relative size below which a singular value is rounding: numpy.linalg.matrix_rank's rule with a square
    root, as the errors of a sum are random (1e-5 for 24 layers of 512 columns in float32), and never below
    what a Gram matrix holds."""
    return max(math.sqrt(max(d1, columns)) * torch.finfo(dtype).eps, 1e-7)


def _exact(base: Layers, device: str) -> Tensor:
    """U of the concatenation: (d1, min(d1, L·d2)), descending."""
    wide = torch.cat([weight.to(device, working_dtype(base.dtype)) for weight in base], dim=1)
    left: Tensor = torch.linalg.svd(wide, full_matrices=False).U
    return left


def _gram(base: Layers, device: str) -> Tensor:
    """G = Σ W_i W_iᵀ: (d1, d1) float64, of which only the blocks on and below the diagonal are filled."""
    gram = torch.zeros(base.shape[0], base.shape[0], dtype=torch.float64, device=device)
    for weight in base:
        add_gram(gram, weight.to(device))
    return gram


def add_gram(gram: Tensor, weight: Tensor) -> None:
    """gram += weight · weightᵀ on and below the diagonal, in row blocks.

    Half-precision weights on CUDA are multiplied as they are and accumulated in float32: their products are
    exact there, and tensor cores do them many times faster than float64 units. Directions below about 1e-3 of
    the largest then mix among themselves, which no reconstruction notices. All else is multiplied in float64.
    """
    halves = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
    weight = weight if halves else weight.to(gram.dtype)
    for start in range(0, len(weight), GRAM_ROWS):
        rows, end = weight[start : start + GRAM_ROWS], min(start + GRAM_ROWS, len(weight))
        target = gram[start:end, :end]
        if halves:
            target += torch.mm(rows, weight[:end].T, out_dtype=torch.float32)
        else:
            target.addmm_(rows, weight[:end].T)


def _leading(gram: Tensor, keep: int) -> Tensor:
    """The `keep` leading eigenvectors of a Gram matrix given by its lower triangle, descending: (d1, keep)
    float64."""
    vectors: Tensor = torch.linalg.eigh(gram, UPLO="L").eigenvectors
    return vectors[:, -keep:].flip(1)


def _randomized(base: Layers, keep: int, oversampling: int, iterations: int, seed: int, device: str) -> Tensor:
    """Approximate leading `keep` left singular vectors: (d1, keep) float64.

    Each iteration is Q ← orth(W Wᵀ Q), both products per layer in one pass, and is orthonormalised, or all
    columns would turn towards the first singular vector. Ω_i comes from a generator of its layer's own, so it
    does not depend on order.
    """
    d1, d2 = base.shape
    dtype = working_dtype(base.dtype)
    width = min(keep + oversampling, d1, len(base) * d2)
    sample = torch.zeros(d1, width, dtype=torch.float64, device=device)
    for i, weight in enumerate(base):
        omega = torch.randn(d2, width, generator=generator_for(seed, "range", i), dtype=dtype)
        sample += weight.to(device, dtype) @ omega.to(device)
    found: Tensor = torch.linalg.qr(sample).Q
    for _ in range(iterations):
        narrow = found.to(dtype)
        sample.zero_()
        for weight in base:
            local = weight.to(device, dtype)
            sample += local @ (local.T @ narrow)
        found = torch.linalg.qr(sample).Q
    small = torch.zeros(width, width, dtype=torch.float64, device=device)
    narrow = found.to(dtype)
    for weight in base:
        add_gram(small, narrow.T @ weight.to(device, dtype))
    return found @ _leading(small, keep)


def _fix_signs(left: Tensor) -> Tensor:
    """Turn each column so that its entry of largest magnitude is positive: routes and libraries choose signs
    freely."""
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    return left * torch.where(largest < 0, -1.0, 1.0).to(left)
