"""Learning rates against the formulas written out by hand."""

from __future__ import annotations

import math

import pytest

from lesa_ray.training.schedule import learning_rate, warmup_steps
from lesa_ray.training.train_settings import TrainConfig


def config(**settings: object) -> TrainConfig:
    given = {"checkpoint": "c", "data": "d", "out": "o", "learning_rate": 1.0, "warmup": 10, **settings}
    return TrainConfig.model_validate(given)


def test_warm_up_is_a_share_or_steps() -> None:
    assert warmup_steps(config(warmup=0.06), 1000) == 60
    assert warmup_steps(config(warmup=10), 1000) == 10
    assert warmup_steps(config(warmup=10), 4) == 4
    assert warmup_steps(config(warmup=1), 1000) == 1
    rates = [learning_rate(step, 100, config()) for step in range(11)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)


def test_cosine_falls_to_the_final_rate() -> None:
    for step in range(10, 100):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert learning_rate(step, 100, config(final_rate=0.1)) == pytest.approx(expected)


def test_linear() -> None:
    assert learning_rate(55, 100, config(schedule="linear")) == pytest.approx(0.5)
    assert learning_rate(99, 100, config(schedule="linear")) == pytest.approx(1 / 90)


def test_wsd_stays_and_then_falls() -> None:
    rates = [learning_rate(step, 100, config(schedule="wsd", decay=0.2)) for step in range(100)]
    assert rates[10:80] == pytest.approx([1.0] * 70)
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    short = config(schedule="wsd", decay=0.1, warmup=0)  # of which a tenth is no step
    assert [learning_rate(step, 4, short) for step in range(4)] == [1.0] * 4


def test_wsd_of_a_run_hardly_longer_than_its_warm_up_falls_from_the_peak() -> None:
    brief = config(schedule="wsd", decay=0.5, warmup=8)
    rates = [learning_rate(step, 12, brief) for step in range(12)]
    assert rates == pytest.approx([*((step + 1) / 8 for step in range(8)), 1.0, 0.75, 0.5, 0.25])


def test_constant_and_no_warm_up() -> None:
    assert learning_rate(0, 10, config(schedule="constant", warmup=0)) == 1.0
    assert learning_rate(9, 10, config(schedule="constant", warmup=0)) == 1.0
