"""A fleet whose store has no room left: nothing half-written counts as finished, and with room it goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from lesa_ray import ExpandConfig, expand
from lesa_ray.distributed.fleet import run_fleet
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.fleet.graph import build
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.store.catalog import Store


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_ray")
def test_a_store_that_fills_up_loses_nothing(models: Path, small_disk: Path, tmp_path: Path) -> None:
    config = FleetConfig.model_validate(
        {
            "name": "f", "store": str(small_disk / "store"), "retries": 0,
            "families": [{"name": "llama", "checkpoint": str(models / "llama")}],
            "stages": {"expand": {"lesa": {"epochs": 200}}},
        }
    )  # fmt: skip
    (stage,) = build(config, "file")
    store, filler = Store(config.store), small_disk / "filler"
    said: list[str] = []

    def say(_: str, text: str) -> None:
        said.append(text)
        if "making" in text and not (filler.exists() or store.finished() or any("no space" in one for one in said)):
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # something else takes the room
                while True:
                    file.write(bytes(2**12))

    (outcome,) = run_fleet(config, [stage], say)
    assert outcome.how == "failed", said
    assert "no space left on the device" in outcome.why
    assert store.finished() == []
    filler.unlink()
    (outcome,) = run_fleet(config, [stage], say)
    assert outcome.how == "made", said
    assert store.record(outcome.place) is not None
    settings = stage.settings(str(tmp_path / "roomy"), {})
    assert isinstance(settings, ExpandConfig)
    expand(settings, InlineRunner())
    for path in (tmp_path / "roomy").glob("model*"):
        assert store.folder(outcome.place).read(path.name) == path.read_bytes()
