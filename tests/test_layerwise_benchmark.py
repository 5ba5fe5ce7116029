"""The benchmark of layer-wise scaled models' training: what it times and what it makes of the figures."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from lesa_ray.errors import UserError
from pipelines.benchmark.layerwise import Timing, measure, models_of, table
from tests.layerwise.models import small_architecture


def test_each_model_is_timed_in_each_round() -> None:
    models = {name: small_architecture(profile=name, layers=3) for name in ("isotropic", "crown")}
    found = measure(models, batch=1, seq_len=16, rounds=2, steps=1, device=torch.device("cpu"))
    assert [len(one.seconds) for one in found.values()] == [2, 2]
    assert all(seconds > 0 for one in found.values() for seconds in one.seconds)
    raw = models["crown"]
    attention = sum(64 * 8 * 2 * (heads + 2) for heads in raw["num_attention_heads_per_layer"])
    ffn = sum(3 * 64 * width for width in raw["intermediate_sizes"])
    assert found["crown"].parameters == 2 * 128 * 64 + attention + ffn + (2 * 3 + 1) * 64


def test_all_models_have_one_budget_and_one_multiple() -> None:
    sizes = {"layers": 6, "params": "1M", "d_model": 64, "head_dim": 8, "kv_heads": 2, "vocab_size": 1024}
    models = models_of(sizes)
    assert set(models) == {"isotropic", "vanilla", "framed", "reverse", "crown"}
    totals = [64 * (3 * sum(raw["intermediate_sizes"]) + 16 * sum(raw["num_attention_heads_per_layer"]))
              + 6 * 64 * 32 + 2 * 1024 * 64 + 13 * 64 for raw in models.values()]  # fmt: skip
    assert all(abs(total - 1_000_000) <= 5_000 for total in totals)
    assert math.gcd(*(width for raw in models.values() for width in raw["intermediate_sizes"])) >= 8
    with pytest.raises(UserError, match="too few"):
        models_of({**sizes, "params": "1K"})


def test_ratios_are_taken_round_by_round() -> None:
    found = {"isotropic": Timing(100, 2.0, [1.0, 2.0, 4.0]), "crown": Timing(100, 1.0, [2.0, 2.0, 2.0])}
    screen = Console(width=100, record=True)
    screen.print(table(found, 64))  # type: ignore[arg-type]
    (row,) = [line for line in screen.export_text().splitlines() if "crown" in line]
    assert "0.500×" in row
    assert "2.000" in row
    assert "1.000×" in row
    assert " 32 " in row
