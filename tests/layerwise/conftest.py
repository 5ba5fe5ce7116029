"""A checkpoint that the tests here share."""

from __future__ import annotations

import pytest

from tests.layerwise.models import small_architecture, write_checkpoint


@pytest.fixture(scope="session")
def layerwise_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of `SMALL` with random weights, as an export leaves it."""
    return write_checkpoint(tmp_path_factory.mktemp("layerwise") / "checkpoint", small_architecture())
