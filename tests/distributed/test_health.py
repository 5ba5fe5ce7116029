"""Figures reach Ray's metrics wherever the output goes."""

from __future__ import annotations

import pytest

from lesa_ray.distributed.health import Health


@pytest.mark.parametrize("place", ["/data/größer/模型", "s3://bucket/größer 2"])
def test_a_place_of_any_letters_is_counted(place: str) -> None:
    """Ray encodes tags as ASCII, and raises where a letter has none."""
    Health(place, "expand").task_ended(3)
