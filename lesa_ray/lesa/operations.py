"""Operations of the phases that are products and factorisations, from sizes alone: multiplications and additions."""

from __future__ import annotations

from lesa_ray.lesa.bounds import GRAM_BLOCK


def gram_flops(d1: int, d2: int, layers: int, element_bytes: int, device: str) -> dict[str, float]:
    block = GRAM_BLOCK[device]
    whole, rest = divmod(d1, block)
    products = block * block * whole * (whole + 1) + 2 * rest * d1
    return {"half" if element_bytes == 2 else "fp64": float(products) * d2 * layers}


def range_flops(d1: int, d2: int, layers: int, rows: int, iterations: int) -> dict[str, float]:
    """Householder QR with its Q: 4·d1·rows² − 4/3·rows³ (Golub, Van Loan, section 5.2)."""
    qr = 4.0 * d1 * rows**2 - 4 / 3 * rows**3
    return {"fp32": (2.0 + 4 * iterations) * layers * d1 * d2 * rows, "fp64": (1 + iterations) * qr}


def project_flops(route: str, d1: int, d2: int, layers: int, rank: int, rows: int) -> dict[str, float]:
    if route == "none":
        return {}
    flops = {"fp32": 2.0 * layers * d1 * d2 * rows}
    if route == "randomized":
        flops["fp32"] += 2.0 * layers * rank * rows * d2
        flops["fp64"] = gram_flops(rows, d2, layers, 4, "cpu")["fp64"] + 2.0 * d1 * rows * rank
        flops["eigh"] = 9.0 * rows**3
    return flops


def ridge_flops(d2: int, rank: int, layers: int, trained: int) -> dict[str, float]:
    """Products of layers with themselves (the lower half), of those two apart and one apart; Cholesky and its solve."""
    near = min(layers, 2 * trained)
    products = near * rank * d2 * (d2 + 256.0) + (trained + near) * 2.0 * rank * d2 * d2
    return {"fp32": products + (2.0 * d2) ** 3 / 3 + 8.0 * d2**3}
