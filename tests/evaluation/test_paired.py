"""Standard errors against their definition, against numpy, and against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lesa_ray.errors import UserError
from lesa_ray.evaluation.paired import difference, ratio
from lesa_ray.evaluation.perplexity import Scores

RANDOM = np.random.default_rng(0)


def scores(nats: list[float], tokens: list[int], rows: list[int], nbytes: list[int], digest: str = "same") -> Scores:
    return Scores(np.array(nats), np.array(tokens), np.array(rows), np.array(nbytes), digest)


def test_windows_of_one_length_give_the_error_of_a_mean() -> None:
    means = RANDOM.normal(3, 1, 50)
    value, error = ratio(means * 8, np.full(50, 8))
    assert value == pytest.approx(means.mean(), rel=1e-12)
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_windows_of_many_lengths_against_repeated_draws() -> None:
    found = []
    for _ in range(2000):
        sizes = RANDOM.integers(1, 40, 100)
        found.append(ratio(RANDOM.normal(2 * sizes, np.sqrt(sizes)), sizes))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(2, abs=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_one_window_says_nothing_of_the_spread() -> None:
    assert ratio(np.array([6.0]), np.array([3])) == (2.0, None)


def test_the_same_windows_are_compared_in_nats_a_token() -> None:
    first = scores([10.0, 20.0, 30.0], [5, 10, 10], [0, 1, 1], [4, 20])
    mine = scores([11.0, 22.0, 31.0], [5, 10, 10], [0, 1, 1], [4, 20])
    found = difference(mine, first, "base")
    assert found | {"value": 0, "stderr": 0} == {
        "to": "base", "of": "loss", "value": 0, "stderr": 0, "over": "windows", "count": 3
    }  # fmt: skip
    assert found["value"] == pytest.approx(4 / 25)
    residuals = [1 - 5 * 0.16, 2 - 10 * 0.16, 1 - 10 * 0.16]
    assert found["stderr"] == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 25)


def test_other_tokens_of_the_same_text_are_compared_in_bits_a_byte() -> None:
    first = scores([10.0, 20.0, 30.0], [5, 10, 10], [0, 1, 1], [4, 20, 0])
    mine = scores([12.0, 40.0], [3, 9], [0, 1], [4, 20, 0], "other")
    found = difference(mine, first, "base")
    assert (found["of"], found["over"], found["count"]) == ("bits_per_byte", "documents", 3)
    assert found["value"] == pytest.approx((52 - 60) / 24 / math.log(2))


def test_other_text_is_refused() -> None:
    first = scores([10.0], [5], [0], [4])
    with pytest.raises(UserError, match="the data changed while it was read"):
        difference(scores([10.0], [5], [0], [5], "other"), first, "base")
    with pytest.raises(UserError, match="the data changed while it was read"):
        difference(scores([10.0], [5], [0], [0], "other"), scores([10.0], [5], [0], [0]), "base")
