"""The benchmark of layer-wise scaled models' training: what it times and what it makes of the figures."""

from __future__ import annotations

import torch
from rich.console import Console

from pipelines.benchmark.layerwise import Timing, measure, table
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


def test_ratios_are_taken_round_by_round() -> None:
    found = {"isotropic": Timing(100, 2.0, [1.0, 2.0, 4.0]), "crown": Timing(100, 1.0, [2.0, 2.0, 2.0])}
    screen = Console(width=100, record=True)
    screen.print(table(found, 64))  # type: ignore[arg-type]
    (row,) = [line for line in screen.export_text().splitlines() if "crown" in line]
    assert "0.500×" in row
    assert "2.000" in row
    assert "1.000×" in row
    assert " 32 " in row
