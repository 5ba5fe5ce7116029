"""Scores after matching: a moved copy is recognised, figures are numpy's, and chance is what random layers reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lesa_ray.lesa.alignment import Layer, move
from lesa_ray.lesa.matched import likeness, match, matched_scores, neighbour_scores, random_like
from tests.lesa.moves import attention, mlp, random_layer, random_map

BLOCKS = {"mlp": mlp(48), "attention": attention(8, 4, 6)}


def noisy(layer: Layer, block: object, size: float, seed: int) -> Layer:
    noise = random_layer(block, 16, seed)  # type: ignore[arg-type]
    return {n: w + size * noise[n] for n, w in layer.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_moved_copy_is_recognised(name: str) -> None:
    block = BLOCKS[name]
    true = random_layer(block, 16, seed=0)
    score = match(move(true, block, random_map(block, 1)), true, block)
    assert score.matched.cosine == pytest.approx(1, abs=1e-9)
    assert score.matched.r2 == pytest.approx(1, abs=1e-9)
    assert score.as_it_is.cosine is not None
    assert abs(score.as_it_is.cosine) < 0.4
    assert set(score.matched_types) == set(score.types) == set(block.matrices)


def test_figures_are_those_of_one_long_vector() -> None:
    block = BLOCKS["mlp"]
    a, b = (random_layer(block, 16, seed) for seed in (0, 1))
    x, y = (np.concatenate([layer[n].numpy().ravel() for n in ("gate", "down")]) for layer in (a, b))
    found = likeness(a, b, ["gate", "down"])
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert found.r2 == pytest.approx(1 - ((y - x) ** 2).sum() / (y**2).sum(), rel=1e-12)
    zero = {n: torch.zeros_like(w) for n, w in a.items()}
    assert (likeness(zero, b, ["up"]).cosine, likeness(zero, b, ["up"]).r2) == (None, 0.0)
    assert (likeness(b, zero, ["up"]).cosine, likeness(b, zero, ["up"]).r2) == (None, None)


@pytest.mark.parametrize("name", BLOCKS)
def test_related_layers_in_orders_of_their_own(name: str) -> None:
    """Neighbours are the true layer with noise, moved: only matching shows it, and the matched mean is nearest."""
    block = BLOCKS[name]
    true = random_layer(block, 16, seed=0)
    lower, upper = (move(noisy(true, block, 0.5, seed), block, random_map(block, seed)) for seed in (1, 2))
    scores = matched_scores(lower, true, upper, block, predicted={"true": true}, seed=3)
    assert list(scores) == ["lower", "upper", "mean", "aligned mean", "true", "random"]
    matched = {name: score.matched.cosine or 0.0 for name, score in scores.items()}
    assert matched["true"] == pytest.approx(1)
    assert matched["aligned mean"] > matched["lower"] + 0.03 > matched["mean"] > matched["random"]
    assert abs(scores["random"].as_it_is.cosine or 0.0) < matched["random"] - 0.1


def test_neighbours_beside_chance() -> None:
    block = BLOCKS["mlp"]
    below = random_layer(block, 16, seed=0)
    above = move(noisy(below, block, 0.5, 1), block, random_map(block, 2))
    scores = neighbour_scores(below, above, block, seed=1)
    assert (scores["neighbour"].matched.cosine or 0) > 0.8 > 0.5 > (scores["random"].matched.cosine or 1)
    again = neighbour_scores(below, above, block, seed=1)
    assert again == scores
    assert neighbour_scores(below, above, block, seed=2)["random"] != scores["random"]


def test_random_layers_have_the_second_moments_of_the_residual_side() -> None:
    block = mlp(1500)
    layer = random_layer(block, 4, seed=0)
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    layer = {n: (mixing @ w if n == "down" else w @ mixing.T).bfloat16() for n, w in layer.items()}
    made = random_like(layer, block, seed=0)
    for n, weight in made.items():
        assert weight.dtype == torch.float32
        assert weight.shape == layer[n].shape
        rows, true = (w.double().T if n == "down" else w.double() for w in (weight, layer[n]))
        moments, wanted = rows.T @ rows, true.T @ true
        assert float((moments - wanted).norm() / wanted.norm()) < 0.1
        assert abs(float((rows * true).sum() / rows.norm() / true.norm())) < 0.05
