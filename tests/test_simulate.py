"""The simulation: shapes alone give the real sizes, and a check really runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.config import LesaSettings, load_settings
from pipelines.benchmark import simulate


@pytest.fixture(scope="module")
def settings() -> simulate.Simulation:
    return load_settings(simulate.Simulation, str(simulate.SETTINGS))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3-8B", 8_030_261_248),
        ("Qwen2.5-32B", 32_763_876_352),
        ("Llama-3-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_shapes_are_those_of_the_published_models(
    name: str, parameters: int, settings: simulate.Simulation, tmp_path: Path
) -> None:
    """The numbers of parameters that their model cards give, to the last one; and the file takes no room."""
    simulate.write_shapes(settings.models[name], tmp_path)
    assert open_checkpoint(str(tmp_path)).parameters == parameters
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 10**6


def test_every_model_is_predicted_on_every_cluster(
    settings: simulate.Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["simulate", "--units", "--json", str(out)])
    simulate.main()
    rows = json.loads(out.read_text())
    assert {(row["model"], row["on"]) for row in rows} == {
        (model, cluster) for model in settings.models for cluster in settings.clusters
    }
    seconds = {(row["model"], row["on"]): row["seconds"] for row in rows}
    for cluster in settings.clusters:
        by_size = [seconds[model, cluster] for model in settings.models]
        assert by_size == sorted(by_size)


def test_the_check_compares_each_phase_with_a_real_run() -> None:
    model = simulate.Model(layers=5, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, vocabulary=64)
    (row,) = simulate.check({"tiny": model}, 1, LesaSettings(epochs=1))
    assert {"load", "gram", "eigh", "project", "train", "yardsticks", "predict", "all of it"} == row["seconds"].keys()
    for figures in row["seconds"].values():
        assert figures["predicted"] > 0
        assert figures["measured"] > 0
    assert len(row["memory"]) == 7
