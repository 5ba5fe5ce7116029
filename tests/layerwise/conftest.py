"""A checkpoint that the tests here share."""

from __future__ import annotations

import json

import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.layerwise.folder import write_code
from tests.layerwise.models import random_model, small_architecture


@pytest.fixture(scope="session")
def layerwise_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of `SMALL` with random weights, as an export leaves it."""
    folder = tmp_path_factory.mktemp("layerwise") / "checkpoint"
    raw = small_architecture()
    model = random_model(raw)
    model.save_pretrained(folder)
    Storage(str(folder)).write("config.json", json.dumps({**raw, "dtype": "float32"}).encode())
    write_code(Storage(str(folder)), raw)
    return str(folder)
