"""Spreads, paired differences and costs at a loss against plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from lesa_ray.comparison.statistics import cost_to_reach, paired, pairs, quantile, spread, unbeaten, untrained, whole


def test_the_spread_over_seeds() -> None:
    found = spread([2.0, 2.5, 4.5])
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (3.0, 2.0, 4.5, 3)
    assert found.sd == pytest.approx(np.std([2.0, 2.5, 4.5], ddof=1))
    one = spread([1.0])
    assert one is not None
    assert one.sd is None
    assert spread([]) is None


def test_differences_are_taken_seed_by_seed() -> None:
    a, b = {0: 1.0, 1: 2.0, 2: 3.0, 7: 99.0}, {2: 2.8, 1: 1.9, 0: 0.9, 8: 0.0}
    found = paired(a, b)
    assert found is not None
    differences = np.array([0.1, 0.1, 0.2])
    half = student.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert (found.mean, found.half, found.n) == (pytest.approx(differences.mean()), pytest.approx(half, rel=1e-3), 3)
    assert not found.clear  # 0.133 ± 0.143
    sharper = paired({0: 1.1, 1: 2.1, 2: 3.11}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert sharper is not None
    assert sharper.clear
    alone = paired({0: 1.0}, {0: 5.0})
    assert alone is not None
    assert (alone.half, alone.clear) == (None, False)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 15, 16, 300])
@pytest.mark.parametrize("family", [1, 190])
def test_quantiles_of_students_t(freedom: int, family: int) -> None:
    assert quantile(freedom, family) == pytest.approx(student.ppf(1 - 0.025 / family, freedom))


@pytest.mark.parametrize("seeds", [3, 10])
def test_of_equal_arms_one_seems_to_differ_from_the_best_in_fewer_than_5_of_100_studies(seeds: int) -> None:
    losses = np.random.default_rng(0).normal(size=(2000, 20, seeds))
    best = losses[np.arange(2000), losses.mean(2).argmin(1)]
    differences = losses - best[:, None]
    errors = differences.std(2, ddof=1) / math.sqrt(seeds)
    apart = differences.mean(2) > errors * quantile(seeds - 1, pairs(20))
    assert apart.any(1).mean() < 0.05
    alone = differences.mean(2) > errors * quantile(seeds - 1)
    assert alone.any(1).mean() > 0.7  # what the picking does


def test_an_interval_beside_the_best_is_wider() -> None:
    a, b = {0: 1.1, 1: 2.1, 2: 3.12}, {0: 1.0, 1: 2.0, 2: 3.0}
    alone, together = paired(a, b), paired(a, b, pairs(20))
    assert alone is not None
    assert together is not None
    assert (alone.clear, together.clear) == (True, False)
    assert (pairs(1), pairs(2), pairs(5)) == (1, 1, 10)


def test_an_arm_that_lacks_a_seed_is_not_whole() -> None:
    assert whole({"a": {0: 2.0}, "b": {0: 1.9, 1: 2.2}, "c": {}, "d": {1: 1.0, 0: 3.0}}) == ["b", "d"]
    assert whole({"a": {0: 2.0}, "b": {1: 1.9}}) == whole({"a": {}}) == []


def test_what_shares_no_seed_is_not_beaten() -> None:
    mine = {0: 1.0, 1: 1.1, 2: 1.2}
    others = {"worse": {0: 2.0, 1: 2.1, 2: 2.2}, "better": {0: 0.5, 1: 0.6, 2: 0.7}, "of other seeds": {7: 9.0}}
    assert unbeaten(mine, others) == ["better", "of other seeds"]


def test_the_untrained_base_has_the_seeds_with_which_an_arm_ended() -> None:
    """With those of runs that failed, every arm would lack a seed."""
    arms = [{"runs": [{"seed": seed, "final_loss": loss} for seed, loss in enumerate((2.0, None))]}]
    (base,) = untrained({"base": {"loss": 3.0}, "arms": arms})
    assert [(run["seed"], run["final_loss"]) for run in base["runs"]] == [(0, 3.0)]
    assert untrained({"base": {"loss": None}, "arms": arms}) == untrained({"base": {"loss": 3.0}, "arms": []}) == []


def test_what_it_costs_to_reach_a_loss() -> None:
    costs, losses = [0.0, 10.0, 30.0], [3.0, 2.0, 1.0]
    assert cost_to_reach(costs, losses, 2.5) == 5.0
    assert cost_to_reach(costs, losses, 1.25) == 25.0
    assert cost_to_reach(costs, losses, 3.5) == 0.0
    assert cost_to_reach(costs, losses, 0.9) is None
    assert cost_to_reach([0.0, 1.0, 2.0], [3.0, 1.0, 2.0], 1.5) == 0.75  # the first time counts
