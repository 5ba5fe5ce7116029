"""One weight type from start to end; figures are checked on the formed weights, by numpy in float64."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lesa_ray.config import LesaSettings
from lesa_ray.errors import UserError
from lesa_ray.lesa.bounds import RIDGE_FEATURES
from lesa_ray.lesa.fit import evenly, fit_weight_type, split_triples
from lesa_ray.lesa.report import FitReport
from lesa_ray.lesa.task import Task, triples_of
from tests.lesa.layers import reference_svd, related_layers

QUICK = LesaSettings(hidden=16, epochs=3, batch_size=16, norm_weight=0.01)


def run(
    layers: list[torch.Tensor], slots: list[tuple[int, int, int]], settings: LesaSettings = QUICK, **options: Any
) -> tuple[FitReport, dict[int, torch.Tensor]]:
    made: dict[int, torch.Tensor] = {}

    def store(slot: int, weight: torch.Tensor) -> None:
        assert slot not in made
        made[slot] = weight

    seed = options.pop("seed", 0)
    report = fit_weight_type(lambda i: layers[i], len(layers), slots, store, settings, seed, **options)
    return report, made


def weight_figures(true: list[np.ndarray], predicted: list[np.ndarray]) -> tuple[float, float]:
    """R² and cosine of weights, all taken as one vector."""
    w, p = np.concatenate(true, axis=None), np.concatenate(predicted, axis=None)
    return 1 - ((w - p) ** 2).sum() / (w**2).sum(), w @ p / np.linalg.norm(w) / np.linalg.norm(p)


def coefficient_loss(layers: list[torch.Tensor], pairs: list[tuple[np.ndarray, np.ndarray]], rank: int) -> float:
    """Mean of QUICK's loss over batches of 16 rows of Σ⁻¹UᵀW, basis by numpy."""
    u, s, _ = reference_svd(layers)
    losses = []
    for true, predicted in pairs:
        v, q = ((u[:, :rank].T @ w) / s[:rank, None] for w in (true, predicted))
        gaps = [(np.linalg.norm(v[at : at + 16]) - np.linalg.norm(q[at : at + 16])) ** 2 for at in range(0, rank, 16)]
        losses.append(0.99 * ((v - q) ** 2).mean() + 0.01 * np.mean(gaps))
    return float(np.mean(losses))


@pytest.mark.parametrize("rank", [None, 32], ids=["the last batch smaller", "whole batches"])
@pytest.mark.parametrize("predictor", ["mlp", "ridge"])
def test_figures_are_those_of_the_weights(rank, predictor, monkeypatch):
    """A slot between a triple's outer layers stores what was predicted for its middle: score that independently. Rows
    are taken in several blocks, as those of large layers are."""
    monkeypatch.setattr("lesa_ray.lesa.streams.BLOCK_ROWS", 7)
    layers = related_layers(10, 40, 24, decay=0.3)
    settings = QUICK.model_copy(update={"rank": rank, "holdout": 0.25, "predictor": predictor})
    training, held_out = split_triples(1, 10, 0.25, seed=0)
    slots = [(10 + at, m - 1, m + 1) for at, m in enumerate(training + held_out)]
    report, made = run(layers, slots, settings)
    assert (report.triples_trained, report.triples_held_out) == (6, 2)
    assert (report.rows_trained, report.rows_held_out) == (6 * (rank or 40), 2 * (rank or 40))
    assert (report.predictor, report.triples_scored) == (predictor, 4)
    scored = [training[at] for at in (0, 2, 3, 5)]

    predicted = {m: made[10 + at].double().numpy() for at, m in enumerate(training + held_out)}
    true = {m: layers[m].double().numpy() for m in predicted}
    assert report.held_out is not None
    for middles, scores in ((scored, report.trained), (held_out, report.held_out)):
        r2, cosine = weight_figures([true[m] for m in middles], [predicted[m] for m in middles])
        assert scores["predictor"].r2 == pytest.approx(r2, abs=1e-5)
        assert scores["predictor"].cosine == pytest.approx(cosine, abs=1e-5)
        pairs = [(true[m], predicted[m]) for m in middles]
        assert scores["predictor"].loss == pytest.approx(coefficient_loss(layers, pairs, rank or 40), rel=1e-4)

        assert (scores["zero"].r2, scores["zero"].cosine) == (0.0, None)
        if rank is None:
            means = [(layers[m - 1] + layers[m + 1]).double().numpy() / 2 for m in middles]
            r2, cosine = weight_figures([true[m] for m in middles], means)
            assert scores["mean"].r2 == pytest.approx(r2, abs=1e-5)
            assert scores["mean"].cosine == pytest.approx(cosine, abs=1e-5)

    norms = [np.linalg.norm(layer.double().numpy()) for layer in layers]
    ratios = [np.linalg.norm(predicted[m]) / (norms[m - 1] + norms[m + 1]) * 2 for m in training + held_out]
    assert report.norm_ratio == pytest.approx(np.mean(ratios), rel=1e-5)
    s = reference_svd(layers)[1][: rank or 40]
    assert report.sigma_max == pytest.approx(s[0], rel=1e-6)
    assert report.sigma_min == pytest.approx(s[-1], rel=1e-5)
    assert report.captured == pytest.approx((s**2).sum() / np.sum(np.square(norms)), abs=1e-6)


def test_ridge_learns_related_layers_and_is_scored_on_both_sides():
    generator = torch.Generator().manual_seed(0)
    start, drift = (torch.randn(60, 8, generator=generator) for _ in range(2))
    layers = [start * math.cos(i / 3) + drift * math.sin(i / 3) for i in range(12)]  # a linear recurrence
    report, _ = run(layers, [])
    assert report.held_out is not None
    assert report.trained["ridge"].r2 == pytest.approx(1, abs=1e-2)
    assert report.held_out["ridge"].r2 == pytest.approx(1, abs=1e-2)
    assert report.held_out["ridge"].cosine == pytest.approx(1, abs=1e-2)


def test_ridge_as_a_yardstick_is_ridge_as_the_predictor():
    """Which is known on weights: of the same penalty, and without a look at what is held out."""
    layers, settings = related_layers(8, 20, 12), QUICK.model_copy(update={"ridge": 0.1})
    rival, _ = run(layers, [], settings)
    chosen, _ = run(layers, [], settings.model_copy(update={"predictor": "ridge"}))
    assert rival.held_out is not None
    assert chosen.held_out is not None
    assert rival.held_out["ridge"] == chosen.held_out["predictor"]
    assert rival.trained["ridge"] == chosen.trained["predictor"]


def test_the_range_finder_is_as_thorough_as_its_settings_say():
    layers = related_layers(6, 60, 30, decay=0.3)
    quick = {"svd": "randomized", "rank": 6, "oversampling": 0, "power_iterations": 0}
    found = [
        run(layers, [], QUICK.model_copy(update={**quick, **more}))[0].captured
        for more in ({}, {"oversampling": 12}, {"power_iterations": 3})
    ]
    assert found[0] < 0.9 * min(found[1:])


@pytest.mark.parametrize("failing", [5, 6, 7])
def test_a_weight_that_cannot_be_stored_ends_the_fit(failing):
    """Weights are written behind the predictions."""

    def store(slot: int, weight: torch.Tensor) -> None:
        if slot == failing:
            raise OSError("the disk is gone")

    layers = related_layers(5, 12, 8)
    with pytest.raises(OSError, match="the disk is gone"):
        fit_weight_type(lambda i: layers[i], 5, [(5, 1, 2), (6, 2, 3), (7, 3, 4)], store, QUICK, 0)


def test_ridge_is_left_out_where_it_costs_too_much(monkeypatch):
    monkeypatch.setitem(RIDGE_FEATURES, "cpu", 15)
    report, _ = run(related_layers(5, 12, 8), [])
    assert report.ridge_skipped == "16 features; it is a yardstick up to 15 on this kind of device"
    assert list(report.trained) == ["predictor", "zero", "mean"]
    chosen, made = run(related_layers(5, 12, 8), [(5, 2, 3)], QUICK.model_copy(update={"predictor": "ridge"}))
    assert chosen.predictor == "ridge"  # who asks for it has it at any size that fits into memory
    assert made[5].isfinite().all()


def test_ridge_is_left_out_where_it_is_not_wanted():
    report, _ = run(related_layers(5, 12, 8), [], QUICK.model_copy(update={"ridge_yardstick": False}))
    assert report.ridge_skipped == "not wanted"
    assert list(report.trained) == ["predictor", "zero", "mean"]


def test_with_predictor_ridge_new_layers_are_ridges_and_nothing_is_trained(monkeypatch):
    """Of full rank, ridge in the basis U Σ with rows weighted alike: checked on weights, by numpy in float64."""
    monkeypatch.setattr("lesa_ray.lesa.fit.train_together", None)
    layers = related_layers(8, 20, 12)
    settings = QUICK.model_copy(update={"predictor": "ridge", "ridge": 0.1})
    report, made = run(layers, [(8, 2, 3), (9, 8, 3)], settings)
    assert report.train_loss == ()
    assert list(report.trained) == ["predictor", "zero", "mean"]

    u, s, _ = reference_svd(layers)
    v = [(u.T @ layer.double().numpy()) / s[:, None] for layer in layers]
    training, _ = split_triples(1, 8, settings.holdout, seed=0)
    x = np.concatenate([np.concatenate([v[m - 1], v[m + 1]], axis=1) for m in training])
    gram = x.T @ x
    penalty = 0.1 * np.diag(gram).mean() * np.eye(24)
    solution = np.linalg.solve(gram + penalty, x.T @ np.concatenate([v[m] for m in training]))
    first = np.concatenate([v[2], v[3]], axis=1) @ solution
    second = np.concatenate([first, v[3]], axis=1) @ solution
    for slot, predicted in ((8, first), (9, second)):
        np.testing.assert_allclose(made[slot].numpy(), (u * s) @ predicted, atol=2e-6)


@pytest.mark.parametrize(
    ("count", "chosen"), [(2, [1, 20]), (4, [1, 5, 9, 20]), (5, [1, 3, 5, 15, 20]), (7, [1, 3, 5, 9, 15, 20])]
)
def test_a_few_of_many_are_spread_evenly(count, chosen):
    assert evenly([1, 3, 5, 9, 15, 20], count) == chosen


def test_many_of_very_many_have_equal_gaps():
    found = evenly(range(4096), 64)
    assert found == list(range(0, 4096, 65))
    assert evenly(range(1), 64) == [0]


def test_new_layers_may_be_neighbours_in_later_rounds(monkeypatch):
    """With the mean in G's place, weights of all rounds are known."""
    monkeypatch.setattr("lesa_ray.lesa.predictor.Predictor.__call__", lambda self, a, b: (a + b) / 2)
    layers = related_layers(5, 20, 12)
    slots = [(5, 1, 2), (6, 3, 4), (7, 1, 5), (8, 5, 2), (9, 7, 5), (10, 6, 4)]
    report, made = run(layers, slots)
    expected = dict(enumerate(layers))
    for slot, lower, upper in slots:
        expected[slot] = (expected[lower] + expected[upper]) / 2
        torch.testing.assert_close(made[slot], expected[slot], atol=1e-6, rtol=1e-5)
    ratios = [
        2 * expected[slot].norm() / (expected[lower].norm() + expected[upper].norm()) for slot, lower, upper in slots
    ]
    assert report.norm_ratio == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-5)
    assert list(made) == [slot for slot, _, _ in slots]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("svd", ["exact", "gram", "randomized", "none"])
def test_every_route_and_dtype_gives_float32_weights(svd, dtype):
    layers = [layer.to(dtype) for layer in related_layers(4, 12, 10)]
    report, made = run(layers, [(4, 1, 2)], QUICK.model_copy(update={"svd": svd}))
    assert report.route == svd
    assert made[4].dtype == torch.float32
    assert made[4].shape == (12, 10)
    assert made[4].is_contiguous()
    assert bool(made[4].isfinite().all())


def test_three_layers_make_one_triple_which_is_trained_on():
    report, made = run(related_layers(3, 12, 10), [(3, 0, 1)])
    assert (report.triples_trained, report.triples_held_out, report.rows_held_out) == (1, 0, 0)
    assert report.held_out is None
    assert list(made) == [3]


def test_two_layers_are_refused():
    with pytest.raises(UserError, match="three layers in a row; the base has 2"):
        run(related_layers(2, 12, 10), [])


@pytest.mark.parametrize(
    ("members", "copies", "layers", "holdout", "trained", "held_out"),
    [
        (5, 1, 32, 0.2, 120, 30),
        (1, 1, 32, 0.2, 24, 6),
        (1, 1, 32, 0.0, 30, 0),
        (1, 1, 4, 0.01, 1, 1),
        (1, 1, 4, 0.99, 1, 1),
        (2, 1, 3, 0.5, 1, 1),
        (1, 5, 32, 0.2, 120, 30),
        (2, 3, 4, 0.5, 6, 6),
        (1, 2, 3, 0.5, 2, 0),
    ],
)
def test_triples_are_split_without_overlap(members, copies, layers, holdout, trained, held_out):
    left, right = split_triples(members, layers, holdout, 1, copies)
    assert (len(left), len(right)) == (trained, held_out)
    valid = {c * layers + i for c in range(copies * members) for i in range(1, layers - 1)}
    assert set(left) | set(right) == valid
    assert not set(left) & set(right)
    assert not {at % (members * layers) for at in left} & {at % (members * layers) for at in right}
    assert split_triples(members, layers, holdout, 1, copies) == (left, right)
    task = Task(1, 1, layers, 0, LesaSettings(holdout=holdout), checkpoints=members * copies, basis=members)
    assert triples_of(task) == (trained, held_out)


def test_a_layer_held_out_is_not_known_from_the_variants():
    """Of independent layers nothing can be predicted, however many copies with a little noise there are of each."""
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(32, 32, generator=generator) for _ in range(10)]
    copies = [[layer + 1e-3 * torch.randn(32, 32, generator=generator) for layer in base] for _ in range(3)]
    settings = QUICK.model_copy(update={"scale": "unit", "hidden": 128, "epochs": 100})
    report, _ = run(base, [], settings, variants=[lambda i, copy=copy: copy[i] for copy in copies])
    assert report.held_out is not None
    assert report.trained["predictor"].r2 > 0.5
    assert report.held_out["predictor"].r2 < 0


def test_the_split_depends_on_the_seed():
    assert len({tuple(split_triples(1, 32, 0.2, seed)[1]) for seed in range(5)}) == 5


def test_triples_of_other_checkpoints_join():
    base = related_layers(5, 20, 12, seed=0)
    tuned = [layer + 0.01 * noise for layer, noise in zip(base, related_layers(5, 20, 12, seed=1), strict=True)]
    alone, without = run(base, [(5, 2, 3)])
    both, joined = run(base, [(5, 2, 3)], variants=[lambda i: tuned[i]])
    assert (alone.checkpoints, alone.triples_trained + alone.triples_held_out) == (1, 3)
    assert (both.checkpoints, both.triples_trained + both.triples_held_out) == (2, 6)
    assert both.captured == alone.captured
    _, twice = run(base, [(5, 2, 3)], variants=[lambda i: base[i]])
    assert not torch.equal(without[5], joined[5])
    assert not torch.equal(twice[5], joined[5])


def test_a_report_is_plain_finite_json_without_times():
    report, _ = run(related_layers(6, 20, 12), [(6, 2, 3)])
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert "seconds" not in values
    assert set(report.seconds) == {"load", "gram", "eigh", "project", "train", "yardsticks", "predict"}
    assert all(value >= 0 for value in report.seconds.values())
    assert len(report.train_loss) == QUICK.epochs


@pytest.mark.parametrize("svd", ["gram", "none"])
def test_layers_of_zeros_give_zeros_and_plain_json(svd):
    report, made = run(
        [torch.zeros(8, 6)] * 4, [(4, 1, 2)], QUICK.model_copy(update={"svd": svd, "learning_rate": 1e-9})
    )
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.norm_ratio is None
    if svd == "gram":
        assert not made[4].any()


@pytest.mark.parametrize("options", [{}, {"memory_budget": 100}], ids=["in memory", "mapped"])
def test_same_inputs_and_seed_same_bytes(tmp_path, options):
    layers = related_layers(6, 40, 24)
    slots = [(6, 2, 3), (7, 2, 6)]
    results = []
    for seed, noise, extra in ((1, 1, {}), (1, 2, {"scratch_dir": str(tmp_path), **options}), (2, 1, {})):
        torch.manual_seed(noise)
        report, made = run(layers, slots, seed=seed, **extra)
        results.append((json.dumps(report.to_dict()), [made[slot].numpy().tobytes() for slot, _, _ in slots]))
    assert results[0] == results[1]
    assert results[0][1] != results[2][1]


def test_a_prediction_that_is_not_finite_is_never_stored():
    settings = QUICK.model_copy(update={"learning_rate": 1e30})
    made: list[int] = []
    layers = related_layers(4, 12, 10)
    with pytest.raises(UserError, match="new layer 4 between 1 and 2: the prediction is not finite"):
        fit_weight_type(lambda i: layers[i], 4, [(4, 1, 2)], lambda slot, _: made.append(slot), settings, 0)
    assert made == []


def test_progress_rises_to_one():
    calls: list[tuple[str, float]] = []
    run(related_layers(5, 12, 10), [(5, 2, 3)], progress=lambda *call: calls.append(call))
    shares = [share for _, share in calls]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert max(shares[:-1]) == pytest.approx(0.9)
    assert len({phase for phase, _ in calls}) == 3


def test_gradient_mode_and_global_randomness_are_left_alone():
    before = torch.random.get_rng_state()
    run(related_layers(4, 12, 10), [(4, 1, 2)])
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.random.get_rng_state())
