"""Infinity in a config.json of transformers 5 reaches the configuration class, and the deeper model's file as it is."""

from __future__ import annotations

import json
import math
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from lesa_ray.checkpoint.depth import completed_config, deeper_config
from lesa_ray.checkpoint.special_floats import decoded
from lesa_ray.evaluation.checkpoints import read_bounds
from lesa_ray.training.model import build

INFINITY = {"__float__": "Infinity"}
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}


def raw_config() -> dict[str, Any]:
    """As transformers writes it."""
    config = AutoConfig.for_model("mamba2", vocab_size=16, **SIZES)
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    assert raw["time_step_limit"] == [0.0, INFINITY]
    return raw


def test_every_reader_of_the_configuration_sees_the_number(tmp_path: Any) -> None:
    raw = raw_config()
    full = completed_config(raw, "base")
    assert full is not None
    assert list(full["time_step_limit"]) == [0.0, math.inf]
    model = build(raw, "base")
    assert list(model.config.time_step_limit) == [0.0, math.inf]
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["time_step_limit"] == [0.0, INFINITY]
    assert read_bounds(str(tmp_path)).vocab_size == 16


def test_the_deeper_model_has_it_as_the_base_had() -> None:
    raw = raw_config()
    assert deeper_config(raw, [0, 0, 1], 2, "base")["time_step_limit"] == [0.0, INFINITY]


def test_other_objects_stay() -> None:
    assert decoded({"a": [{"__float__": "-Infinity"}], "b": {"__float__": "1.5"}}) == {
        "a": [-math.inf],
        "b": {"__float__": "1.5"},
    }
    assert math.isnan(decoded({"__float__": "NaN"}))
