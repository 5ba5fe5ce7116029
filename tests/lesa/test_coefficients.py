"""The settings that change what the predictor sees and how large its layers are, on formed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.fit import fit_weight_type, split_triples
from lesa_ray.lesa.spectral import decompose
from tests.lesa.layers import reference_svd, related_layers

QUICK = LesaSettings(hidden=8, epochs=2, batch_size=16, norm_weight=0)


@pytest.mark.parametrize("svd", ["gram", "exact", "randomized", "none"])
@pytest.mark.parametrize("scale", ["none", "unit"])
@pytest.mark.parametrize("weigh", ["direction", "energy"])
def test_coefficients_are_weighed_and_scaled_and_compose_to_the_weights(weigh, scale, svd):
    layers = related_layers(5, 16, 12, decay=0.5)
    parts = decompose([layers.__getitem__], 5, svd=svd, weigh=weigh, scale=scale)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(parts.compose(parts.coefficients[0, i]), layer, atol=2e-6, rtol=0)
    rows = parts.coefficients[0].double().square().mean(dim=(0, 2))  # of each direction
    _, s, _ = reference_svd(layers)
    energies = s**2 / 60 if svd != "none" else np.mean([(w.double().numpy() ** 2).mean(1) for w in layers], axis=0)
    by_row = np.ones(16) / 60 if weigh == "direction" and svd != "none" else energies
    if scale == "unit":
        by_row = by_row / by_row.mean()
        assert float(rows.mean()) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(rows.numpy(), by_row, rtol=2e-4)
    if svd != "none":
        np.testing.assert_allclose(parts.sigma.numpy(), s, rtol=0, atol=1e-5 * s[0])
        assert parts.captured == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("svd", ["gram", "none"])
def test_the_scale_is_that_of_the_members_of_the_basis(svd):
    """Not of the variants, and of every member."""
    members = [[size * layer for layer in related_layers(4, 16, 12, seed=size)] for size in (1, 3, 20)]
    loads = [one.__getitem__ for one in members]
    parts = decompose(loads, 4, basis=2, svd=svd, scale="unit")
    assert float(parts.coefficients[:2].double().square().mean()) == pytest.approx(1, rel=1e-5)
    for at, one in enumerate(members):
        for i, layer in enumerate(one):
            torch.testing.assert_close(parts.compose(parts.coefficients[at, i]), layer, atol=2e-5, rtol=0)


def run(settings: LesaSettings, layers: list[torch.Tensor], slots: list[tuple[int, int, int]]):
    made: dict[int, torch.Tensor] = {}
    report = fit_weight_type(layers.__getitem__, len(layers), slots, made.__setitem__, settings, 0)
    return report, made


@pytest.mark.parametrize("scale", ["none", "unit"])
def test_weighed_by_energy_the_loss_is_the_error_of_the_weights(scale):
    layers = related_layers(8, 16, 12, decay=0.5)
    _, held_out = split_triples(1, 8, QUICK.holdout, seed=0)
    slots = [(8 + at, m - 1, m + 1) for at, m in enumerate(held_out)]
    report, made = run(QUICK.model_copy(update={"weigh": "energy", "scale": scale}), layers, slots)
    assert report.held_out is not None
    errors = [((made[8 + at] - layers[m]).double() ** 2).mean() for at, m in enumerate(held_out)]
    unit = float(torch.stack(layers).double().square().mean()) if scale == "unit" else 1.0
    assert report.held_out["predictor"].loss * unit == pytest.approx(float(sum(errors)) / len(errors), rel=1e-4)
    squares = [(layers[m].double() ** 2).mean() for m in held_out]
    r2 = 1 - float(sum(errors)) / float(sum(squares))
    assert report.held_out["predictor"].r2 == pytest.approx(r2, abs=1e-5)


def test_ridge_weighs_rows_by_energy_and_does_not_see_the_scale():
    layers = related_layers(8, 16, 12, decay=1.0)
    base = QUICK.model_copy(update={"predictor": "ridge", "ridge": 0.1})
    made = {
        (weigh, scale): run(base.model_copy(update={"weigh": weigh, "scale": scale}), layers, [(8, 3, 4)])[1][8]
        for weigh in ("direction", "energy")
        for scale in ("none", "unit")
    }
    for weigh in ("direction", "energy"):
        torch.testing.assert_close(made[weigh, "none"], made[weigh, "unit"], atol=1e-6, rtol=0)
    training, _ = split_triples(1, 8, QUICK.holdout, seed=0)
    w = [layer.double().numpy() for layer in layers]
    x = np.concatenate([np.concatenate([w[m - 1], w[m + 1]], axis=1) for m in training])  # U is orthonormal
    gram = x.T @ x
    solution = np.linalg.solve(
        gram + 0.1 * np.diag(gram).mean() * np.eye(24), x.T @ np.concatenate([w[m] for m in training])
    )
    np.testing.assert_allclose(
        made["energy", "none"].numpy(), np.concatenate([w[3], w[4]], axis=1) @ solution, atol=2e-6
    )
    assert not torch.allclose(made["energy", "none"], made["direction", "none"], atol=1e-4)


def test_norms_are_set_to_the_neighbours(monkeypatch):
    """Of later rounds too, whose neighbours were set themselves. The report tells what was predicted."""
    monkeypatch.setattr("lesa_ray.lesa.predictor.Predictor.__call__", lambda self, a, b: (a + b) / 2)
    layers, slots = related_layers(6, 16, 12), [(6, 2, 3), (7, 6, 3)]
    report, made = run(QUICK.model_copy(update={"norms": "neighbours"}), layers, slots)
    expected, ratios = dict(enumerate(layers)), []
    for slot, lower, upper in slots:
        below, above = expected[lower], expected[upper]
        mean, size = (below + above) / 2, (below.norm() + above.norm()) / 2
        ratios.append(float(mean.norm() / size))
        expected[slot] = mean * (size / mean.norm())
        torch.testing.assert_close(made[slot], expected[slot], atol=1e-6, rtol=1e-5)
    assert report.norm_ratio == pytest.approx(sum(ratios) / 2, rel=1e-5)


def test_zero_layers_have_nothing_to_scale():
    zeros = [torch.zeros(6, 4) for _ in range(4)]
    for svd in ("gram", "none"):
        settings = QUICK.model_copy(update={"scale": "unit", "norms": "neighbours", "svd": svd, "predictor": "ridge"})
        _, made = run(settings, zeros, [(4, 1, 2)])
        assert not made[4].any()
