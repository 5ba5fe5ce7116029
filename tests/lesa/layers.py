"""Random layers with a common basis, for the tests of the numerical core."""

import numpy as np
import torch


def related_layers(count: int, d1: int, d2: int, seed: int = 0, decay: float = 0.0) -> list[torch.Tensor]:
    """Float32 matrices U diag(s) R_i, s_k = (k+1)^-decay, where R_i drifts with i; (d1, d2) each."""
    rng = np.random.default_rng(seed)
    k = min(d1, count * d2)
    left = np.linalg.qr(rng.standard_normal((d1, k)))[0]
    scale = (1.0 + np.arange(k)) ** -decay
    row = rng.standard_normal((k, d2))
    layers = []
    for _ in range(count):
        row = 0.7 * row + 0.7 * rng.standard_normal((k, d2))
        layers.append(torch.from_numpy(0.05 * (left * scale) @ row).float())
    return layers


def reference_svd(layers: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, Vᵀ of the concatenation by numpy in float64."""
    wide = np.concatenate([layer.double().numpy() for layer in layers], axis=1)
    return np.linalg.svd(wide, full_matrices=False)
