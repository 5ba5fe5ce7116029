"""The layers as points: PCA against numpy's SVD, t-SNE by what it promises."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from lesa_ray.analysis.pictures import TSNE_LAYERS, draw, principal, suited_perplexity


def points(layers: int, width: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))


def test_pca_is_the_svd_of_the_centred_points() -> None:
    some = points(9) * torch.linspace(3, 0.1, 40)
    centred = some.double().numpy() - some.double().numpy().mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left * values
    expected *= np.sign(np.take_along_axis(expected, np.abs(expected).argmax(0)[None], 0))
    picture = draw(some)
    np.testing.assert_allclose(picture.pca, expected[:, :2], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(picture.pca_share, (values**2 / (values**2).sum())[:2], rtol=1e-9)


def test_principal_coordinates_keep_all_distances() -> None:
    some = points(7)
    coordinates, shares = principal(some)
    np.testing.assert_allclose(
        torch.cdist(coordinates, coordinates), torch.cdist(some.double(), some.double()), atol=1e-9
    )
    assert float(shares.sum()) == pytest.approx(1)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)


def test_tsne_keeps_groups_together_and_is_the_same_again() -> None:
    groups = points(2, seed=1).repeat_interleave(6, 0) * 20 + points(12, seed=2)
    picture = draw(groups)
    assert picture.tsne == draw(groups).tsne
    assert picture.tsne_missing is None
    plane = torch.tensor(picture.tsne)
    distances = torch.cdist(plane, plane).fill_diagonal_(torch.inf)
    nearest = distances.argmin(1)
    assert (nearest // 6 == torch.arange(12) // 6).all()
    assert picture.tsne_perplexity == pytest.approx(11 / 3)


def test_too_few_layers_for_tsne() -> None:
    for layers in range(1, TSNE_LAYERS):
        picture = draw(points(layers))
        assert picture.tsne is None
        assert picture.tsne_perplexity is None
        assert "too few" in (picture.tsne_missing or "")
        assert len(picture.pca) == layers
        assert all(len(point) == 2 for point in picture.pca)
    assert draw(points(TSNE_LAYERS)).tsne is not None


def test_equal_layers_are_one_point() -> None:
    picture = draw(points(1).expand(8, -1))
    assert picture.pca == [[0.0, 0.0]] * 8
    assert picture.pca_share == [0.0, 0.0]
    assert "same" in (picture.tsne_missing or "")


def test_without_scikit_learn_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    picture = draw(points(8))
    assert picture.tsne is None
    assert "pip install" in (picture.tsne_missing or "")
    assert len(picture.pca) == 8


@pytest.mark.parametrize(("layers", "expected"), [(6, 2.0), (32, 31 / 3), (80, 79 / 3), (200, 30.0)])
def test_perplexity_follows_the_number_of_layers(layers: int, expected: float) -> None:
    assert suited_perplexity(layers) == pytest.approx(expected)
    assert suited_perplexity(layers) < layers
