"""Spreads, paired differences and costs at a loss against plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from lesa_ray.comparison.statistics import cost_to_reach, paired, spread, t975


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


@pytest.mark.parametrize("freedom", [1, 2, 4, 15, 16, 40, 300])
def test_quantiles_of_students_t(freedom: int) -> None:
    assert t975(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=2e-3)


def test_what_it_costs_to_reach_a_loss() -> None:
    costs, losses = [0.0, 10.0, 30.0], [3.0, 2.0, 1.0]
    assert cost_to_reach(costs, losses, 2.5) == 5.0
    assert cost_to_reach(costs, losses, 1.25) == 25.0
    assert cost_to_reach(costs, losses, 3.5) == 0.0
    assert cost_to_reach(costs, losses, 0.9) is None
    assert cost_to_reach([0.0, 1.0, 2.0], [3.0, 1.0, 2.0], 1.5) == 0.75  # the first time counts
