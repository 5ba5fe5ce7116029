"""Eigenvectors of a symmetric matrix that is larger than an eigensolver takes: its spectrum is split, each part solved.

Up to CUDA 12 cuSOLVER's solver takes some 23,000 rows (NVIDIA/CUDALibrarySamples, issue 246; JuliaGPU/CUDA.jl, issue
2908), and the gate and up projections of a 70B model have 28,672; since CUDA 13.0 its sizes are of 64 bits (NVIDIA's
release notes of 13.0, by JuliaGPU/CUDA.jl, pull request 3084), and nothing is split. With σ between two eigenvalues,
sign(A − σI) has A's eigenvectors and the eigenvalues ±1, so P = (I + sign)/2 projects onto those above σ. An
orthonormal basis [V₁ V₂] of what P keeps and of the rest makes two smaller matrices VᵢᵀAVᵢ of A (spectral divide and
conquer: Nakatsukasa and Higham, SIAM J. Sci. Comput. 35, 2013). The sign comes from Newton's iteration X ← (γX +
(γX)⁻¹)/2 with scaling γ (Higham, Functions of Matrices, chapter 5; stable for what it is used for here: Byers and Xu,
SIAM J. Matrix Anal. Appl. 30, 2008). All of it is products, inverses and QR, which have no such bound on a GPU; it
takes some 30·n³ operations beside the parts' own.

σ need not be the median: any that leaves both parts small enough does. A few Lanczos runs from random vectors estimate
how the eigenvalues are spread (Lin, Saad and Yang, SIAM Review 58, 2016), and a σ that was too far off narrows what is
left. It has been tried on CPUs alone, where nothing needs it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lesa_ray.lesa.streams import generator_for

_ITERATIONS, _TRIES = 60, 6
_STEPS, _STARTS = 96, 3  # of Lanczos
_SAME = 1e-12  # of the largest eigenvalue: what rounding makes of equal ones, with room to spare
_COUPLING = 1e-10
"""Of the matrix' norm: what may couple the parts. Rounding leaves 1e-14; more is a split that failed."""


class SplitError(RuntimeError):
    """The spectrum could not be split."""


def split_eigh(matrix: Tensor, most: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) as columns of a symmetric matrix (n, n) in float64.

    most: rows of the largest matrix that is solved as it is. seed: of the random vectors; the result's rounding follows
    from it. Raises: SplitError, with `matrix` as it was."""
    n = len(matrix)
    if n <= most:
        found = torch.linalg.eigh(matrix)
        return found.eigenvalues, found.eigenvectors
    above, count = _projector(matrix, most, seed)
    basis = _basis(above, count, seed)
    del above
    upper, lower = basis[:, :count], basis[:, count:]
    image = matrix @ upper
    if (lower.T @ image).norm() > _COUPLING * matrix.norm():
        raise SplitError(f"the two parts of a spectrum of {n} eigenvalues are not apart")
    halves = [lower.T @ (matrix @ lower), upper.T @ image]
    del image
    values, vectors = [], torch.empty_like(matrix)
    start = 0
    for part, half in zip((lower, upper), halves, strict=True):
        own, turns = split_eigh((half + half.T) / 2, most, seed + 1)
        values.append(own)
        vectors[:, start : start + len(own)] = part @ turns
        start += len(own)
    return torch.cat(values), vectors


def _projector(matrix: Tensor, most: int, seed: int) -> tuple[Tensor, int]:
    """Onto the eigenvectors above some σ, such that these, `count` of them, and the rest are few enough."""
    n = len(matrix)
    fewest = max(n - most, 1) if n <= 2 * most else n // 4
    nodes, below = _spread(matrix, seed)
    apart = nodes.diff() > _SAME * nodes.abs().max()  # what is closer may be one eigenvalue, found from several starts
    places, shares = ((nodes[1:] + nodes[:-1]) / 2)[apart], below[:-1][apart]
    low, high = 0.0, 1.0  # shares of the estimate
    for _ in range(_TRIES):
        inside = (low < shares) & (shares < high)
        places, shares = places[inside], shares[inside]
        if not len(places):
            break
        at = int((shares - (low + high) / 2).abs().argmin())
        sign = _sign(matrix, float(places[at]))
        count = round(((sign.trace() + n) / 2).item())
        if fewest <= count <= n - fewest:
            sign.diagonal().add_(1.0)
            return sign.mul_(0.5), count
        low, high = (float(shares[at]), high) if count > n - fewest else (low, float(shares[at]))
    raise SplitError(f"no place was found to split a spectrum of {n} eigenvalues")


def _spread(matrix: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Where the eigenvalues lie: nodes, ascending, and the estimated share of eigenvalues up to each; on the host."""
    n = len(matrix)
    steps = min(_STEPS, n)
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(_STARTS):
        vector = torch.randn(n, dtype=matrix.dtype, generator=generator_for(seed, "split", start)).to(matrix.device)
        frame = matrix.new_zeros(n, steps)
        frame[:, 0] = vector / vector.norm()
        small = torch.zeros(steps, steps, dtype=matrix.dtype)
        for step in range(steps):
            image = matrix @ frame[:, step]
            small[step, step] = frame[:, step] @ image
            for _ in range(2):  # orthogonal to all that came before, twice, as once is not enough
                image -= frame[:, : step + 1] @ (frame[:, : step + 1].T @ image)
            length = image.norm().item()
            if step + 1 == steps or length <= _SAME * small.abs().max().item():
                small = small[: step + 1, : step + 1]
                break
            small[step, step + 1] = small[step + 1, step] = length
            frame[:, step + 1] = image / length
        nodes, turns = torch.linalg.eigh(small)
        found.append((nodes, turns[0] ** 2 / _STARTS))
    nodes, order = torch.cat([one for one, _ in found]).sort()
    return nodes, torch.cat([weights for _, weights in found])[order].cumsum(0)


def _sign(matrix: Tensor, shift: float) -> Tensor:
    """sign(A − shift·I), symmetric."""
    now = matrix.clone()
    now.diagonal().sub_(shift)
    scaled = True
    for _ in range(_ITERATIONS):
        inverse: Tensor
        inverse, info = torch.linalg.inv_ex(now)
        if info.item():
            raise SplitError("an eigenvalue lies where the spectrum was to be split")
        inverse = inverse.add_(inverse.T.clone()).mul_(0.5)
        scale = math.sqrt((inverse.norm() / now.norm()).item()) if scaled else 1.0
        if not math.isfinite(scale) or not scale:
            raise SplitError("an eigenvalue lies where the spectrum was to be split")
        inverse.mul_(0.5 / scale).add_(now, alpha=0.5 * scale)
        moved = ((inverse - now).norm() / inverse.norm()).item()
        now = inverse
        if moved < 1e-14 * len(now) ** 0.5 or (not scaled and moved < 1e-8):  # it converges quadratically
            return now
        scaled = scaled and moved > 1e-2
    raise SplitError("the matrix sign function does not converge")


def _basis(projector: Tensor, count: int, seed: int) -> Tensor:
    """(n, n) orthonormal, of which the first `count` columns span what the projector keeps."""
    start = torch.randn(len(projector), count, dtype=projector.dtype, generator=generator_for(seed, "basis"))
    frame = projector @ start.to(projector.device)
    frame = projector @ torch.linalg.qr(frame).Q  # random columns are not quite independent: once more, from good ones
    whole: Tensor = torch.linalg.qr(frame, mode="complete").Q
    return whole
