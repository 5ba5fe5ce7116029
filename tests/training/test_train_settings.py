"""Settings of training that no run can have are refused as settings, before anything is opened."""

from __future__ import annotations

from typing import Any

import pytest

from lesa_ray import UserError
from lesa_ray.config import validated
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"betas": "0.9,1.5"}, "betas: Input should be less than 1"),
        ({"betas": [-0.1, 0.95]}, "betas: Input should be greater than or equal to 0"),
        ({"learning_rate": float("inf")}, "learning_rate: Input should be a finite number"),
        ({"epochs": "inf"}, "epochs: Input should be a finite number"),
        ({"clip": float("nan")}, "clip: Input should be a finite number"),
    ],
)
@pytest.mark.parametrize("kind", [TrainConfig, FinetuneConfig])
def test_numbers_that_no_run_can_have(kind: type[TrainConfig], change: dict[str, Any], says: str) -> None:
    given = {"checkpoint": "c", "data": "d", "out": "o"}
    validated(kind, given, "options")
    with pytest.raises(UserError) as error:
        validated(kind, {**given, **change}, "options")
    assert str(error.value) == f"options: {says}"
