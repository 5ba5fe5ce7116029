"""Singular values of one layer's matrix, and what they come to in one number.

Through the Gram matrix of the smaller side: n²·m operations for the product and about 4/3·n³ for its eigenvalues, with
n ≤ m the two sides, where a singular value decomposition takes several times that. Squaring costs half the digits: a
value below 1e-8 of the largest (3e-4 for half-precision weights, whose products are summed in float32) is rounding.
Such values weigh next to nothing in a sum of squares. In an entropy they do where nearly all values are that small: of
a float16 matrix of rank 1, n = 1,024, the effective rank comes out as 1.21 for 1.05, with σ = e^(−k/3), n = 2,048, as
9.07 for 8.48; with σ = e^(−k/200), n = 512, and of random weights it is right to four digits. They are not left out, as
bfloat16's own rounding lies there, too, and is part of the matrix (rank 1, n = 512: 1.23, without them 1.01, exactly
1.23).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lesa_ray.lesa.spectral import add_gram


def singular_values(weight: Tensor) -> Tensor:
    """Of a (d1, d2) on any device: (min(d1, d2),) float64 on the CPU, descending."""
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram = torch.zeros(len(short), len(short), dtype=torch.float64, device=weight.device)
    add_gram(gram, short)
    squares: Tensor = torch.linalg.eigvalsh(gram, UPLO="L")
    return squares.clamp_min_(0).sqrt_().flip(0).cpu()


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values (n,) scaled to sum 1 (Roy, Vetterli 2007): n if all are equal, 1 if one
    alone is not zero, 0 for a zero matrix."""
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def stable_rank(values: Tensor) -> float:
    """‖W‖²_F / σ₁² (Rudelson, Vershynin 2007) from the singular values (n,), the largest first; 0 for a zero matrix."""
    return float((values / values[0]).square().sum()) if values[0] > 0 else 0.0
