"""Scores after matching: a moved copy is recognised, figures are numpy's, and chance is what random layers reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf_shrinkage

from lesa_ray.checkpoint.blocks import Block
from lesa_ray.lesa.alignment import Layer, move
from lesa_ray.lesa.matched import likeness, match, matched_scores, neighbour_scores, random_like, shrinkage
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
    assert scores["random"] == match(random_like([lower, upper], block, 3), true, block), "made without a look at it"


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
    made = random_like([layer, layer], block, seed=0)
    for n, weight in made.items():
        assert weight.dtype == torch.float32
        assert weight.shape == layer[n].shape
        rows, true = (w.double().T if n == "down" else w.double() for w in (weight, layer[n]))
        moments, wanted = rows.T @ rows, true.T @ true
        assert float((moments - wanted).norm() / wanted.norm()) < 0.1
        assert abs(float((rows * true).sum() / rows.norm() / true.norm())) < 0.05


@pytest.mark.parametrize("name", ["a head of few rows", "heads", "neurons"])
def test_chance_is_what_a_layer_without_anything_in_common_reaches(name: str) -> None:
    """Two layers drawn from one distribution, which is far from even; more channels than rows."""
    block = {"a head of few rows": attention(1, 1, 8, "any"), "heads": attention(4, 2, 8), "neurons": mlp(32)}[name]
    size = torch.logspace(0, -1, 64, dtype=torch.float64)
    found = []
    for seed in range(3):
        turn = torch.linalg.qr(random_layer(mlp(64), 64, 100 + seed)["gate"]).Q * size
        below, above = (
            {n: turn.T @ w if block.parts[n] in ("o", "down") else w @ turn for n, w in layer.items()}
            for layer in (random_layer(block, 64, 10 * seed + k) for k in range(2))
        )
        scores = neighbour_scores(below, above, block, seed=seed)
        mixed = match(mixture(below, block, seed), below, block)
        found.append([score.matched.cosine or 0.0 for score in (scores["neighbour"], scores["random"], mixed)])
        noise = random_layer(block, 64, 50 + seed)
        related = move({n: w + 0.02 * noise[n] for n, w in below.items()}, block, random_map(block, seed))
        scores = neighbour_scores(below, related, block, seed=seed)
        assert (scores["neighbour"].matched.cosine or 0) > (scores["random"].matched.cosine or 1) + 0.2
    neighbour, random, mixed = np.mean(found, axis=0)
    assert abs(neighbour - random) < 0.03
    assert mixed > neighbour + 0.03, "mixed from the true layer's own rows it would be no chance"


def mixture(layer: Layer, block: Block, seed: int) -> Layer:
    """Rows mixed from the rows of `layer`."""
    made = {}
    for n in block.matrices:
        outward = block.parts[n] in ("o", "down")
        rows = layer[n].T if outward else layer[n]
        mixed = random_layer(mlp(len(rows)), len(rows), seed)["gate"] @ rows
        made[n] = mixed.T if outward else mixed
    return made


@pytest.mark.parametrize("rows", [5, 30, 200])
def test_shrinkage_is_ledoits_and_wolfs(rows: int) -> None:
    draw = np.random.default_rng(rows)
    for sizes in (np.ones(30), np.logspace(0, -2, 30)):
        x = draw.standard_normal((rows, 30)) * sizes
        expected = ledoit_wolf_shrinkage(x, assume_centered=True)
        assert shrinkage(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-10)
    assert shrinkage(torch.zeros(rows, 30)) == 1.0
