"""All figures of a weight type, against numpy in float64 on the matrices themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lesa_ray import UserError
from lesa_ray.analysis.pictures import DIRECTIONS
from lesa_ray.analysis.weight_type import TypeFigures, analyse_type, cosine

LAYERS = 7


def weights(d1: int, d2: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Layers that drift: each is near the one below, and all share some directions."""
    draw = torch.Generator().manual_seed(3)
    layer, made = torch.randn(d1, d2, generator=draw), []
    for _ in range(LAYERS):
        layer = 0.8 * layer + torch.randn(d1, d2, generator=draw)
        made.append(layer.to(dtype))
    return made


def analysed(layers: list[torch.Tensor]) -> tuple[TypeFigures, list[NDArray[np.float64]]]:
    return analyse_type(layers.__getitem__, len(layers)), [layer.double().numpy() for layer in layers]


@pytest.mark.parametrize(
    ("d1", "d2", "dtype", "digits"),
    [(24, 40, torch.float32, 1e-5), (40, 24, torch.float64, 1e-9), (30, 30, torch.bfloat16, 1e-4)],
)
def test_figures_are_numpys(d1: int, d2: int, dtype: torch.dtype, digits: float) -> None:
    figures, plain = analysed(weights(d1, d2, dtype))
    spectra = [np.linalg.svd(layer, compute_uv=False) for layer in plain]
    shares = [values / values.sum() for values in spectra]
    assert figures.shape == [d1, d2]
    np.testing.assert_allclose(figures.norms, [np.linalg.norm(layer) for layer in plain], rtol=1e-6)
    rounding = 3e-4 * max(values[0] for values in spectra) if dtype == torch.bfloat16 else 0
    quantiles = np.array(spectra)[:, figures.spectrum_index]
    np.testing.assert_allclose(figures.spectra, quantiles, rtol=digits, atol=rounding)
    np.testing.assert_allclose(figures.effective_rank, [np.exp(-(p * np.log(p)).sum()) for p in shares], rtol=digits)
    np.testing.assert_allclose(figures.stable_rank, [(s**2).sum() / s[0] ** 2 for s in spectra], rtol=digits)
    pairs = itertools.pairwise(plain)
    expected = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    np.testing.assert_allclose(np.array(figures.neighbour_cosine, float), expected, rtol=1e-5)

    wide = np.linalg.svd(np.concatenate(plain, 1), compute_uv=False)
    np.testing.assert_allclose(figures.common_spectrum, wide, rtol=digits)
    assert figures.common_directions == len(wide)
    energy = (wide**2).cumsum() / (wide**2).sum()
    assert list(figures.captured) == ["1", "4", "16"]
    np.testing.assert_allclose(list(figures.captured.values()), energy[[0, 3, 15]], rtol=digits)


def test_the_picture_is_of_the_leading_coefficients() -> None:
    figures, plain = analysed(weights(24, 40))
    _, _, right = np.linalg.svd(np.concatenate(plain, 1), full_matrices=False)
    points = right[:DIRECTIONS].reshape(DIRECTIONS, LAYERS, 40).swapaxes(0, 1).reshape(LAYERS, -1)
    points = points - points.mean(0)
    left, values, _ = np.linalg.svd(points, full_matrices=False)
    np.testing.assert_allclose(np.abs(figures.pictures["pca"]), np.abs(left * values)[:, :2], atol=1e-5)
    assert figures.pictures["directions"] == DIRECTIONS
    assert len(figures.pictures["tsne"]) == LAYERS


def test_zero_layers_have_rank_zero_and_no_cosine() -> None:
    layers = weights(12, 20)
    layers[2] = torch.zeros(12, 20)
    figures, _ = analysed(layers)
    assert (figures.norms[2], figures.effective_rank[2], figures.stable_rank[2]) == (0, 0, 0)
    assert figures.spectra[2] == [0] * 12
    assert [value is None for value in figures.neighbour_cosine] == [False, True, True, False, False, False]
    nothing, _ = analysed([torch.zeros(12, 20)] * 3)
    assert nothing.captured == {"1": 1.0}
    assert nothing.pictures["pca"] == [[0, 0]] * 3


def test_one_layer_has_no_neighbours() -> None:
    figures, _ = analysed(weights(12, 20)[:1])
    assert figures.neighbour_cosine == []
    assert figures.pictures["pca"] == [[0, 0]]


def test_layers_that_are_not_finite_are_named() -> None:
    layers = weights(12, 20)
    layers[4][0, 0] = torch.nan
    with pytest.raises(UserError, match="layer 4"):
        analysed(layers)


def test_cosine_of_half_precision_is_summed_in_more() -> None:
    a, b = (layer.bfloat16() for layer in weights(64, 300)[:2])
    plain = [layer.double().numpy() for layer in (a, b)]
    expected = (plain[0] * plain[1]).sum() / np.linalg.norm(plain[0]) / np.linalg.norm(plain[1])
    assert cosine(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_figures(dtype: torch.dtype) -> None:
    layers = weights(24, 40, dtype)
    here = analyse_type(layers.__getitem__, LAYERS)
    there = analyse_type(layers.__getitem__, LAYERS, device="cuda")
    assert there.norms == pytest.approx(here.norms, rel=1e-5)
    assert there.effective_rank == pytest.approx(here.effective_rank, rel=1e-3)
    assert there.common_spectrum == pytest.approx(here.common_spectrum, rel=1e-3)
    assert there.neighbour_cosine == pytest.approx(here.neighbour_cosine, abs=1e-4)
