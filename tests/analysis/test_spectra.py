"""Singular values and ranks, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lesa_ray.analysis.spectra import effective_rank, singular_values, stable_rank


@pytest.mark.parametrize("shape", [(6, 17), (17, 6), (9, 9), (1, 5)])
def test_singular_values_are_numpys(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight), expected, rtol=1e-9)
    np.testing.assert_allclose(singular_values(weight.T), expected, rtol=1e-9)


def test_half_precision_is_as_good_as_its_digits() -> None:
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight), expected, rtol=1e-5)


def test_effective_rank_is_exp_of_the_entropy() -> None:
    values = np.array([5.0, 3.0, 1.5, 0.25, 0.0])
    shares = values[:4] / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-12)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_stable_rank() -> None:
    assert stable_rank(torch.tensor([4.0, 2.0, 2.0])) == pytest.approx((16 + 4 + 4) / 16)
    assert stable_rank(torch.zeros(3)) == 0
