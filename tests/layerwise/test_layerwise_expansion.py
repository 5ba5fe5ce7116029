"""Depth for models whose layers differ: copied layers keep their own widths."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.expansion.prepare import prepare as laid_out
from lesa_ray.layerwise.names import CODE_FILES
from lesa_ray.report import terminal
from lesa_ray.training.run import prepare
from lesa_ray.training.train_settings import TrainConfig
from tests.families import logits, tokens
from tests.layerwise.models import loaded, random_model, small_architecture
from tests.training.blocks import make_blocks

Grow = Callable[..., Expanded]
LISTS = ("intermediate_sizes", "num_attention_heads_per_layer", "num_key_value_heads_per_layer")


@pytest.mark.parametrize(
    ("method", "layers", "origins"),
    [("llama-pro", 8, [0, 1, 1, 2, 3, 3, 4, 4]), ("solar", 8, [0, 1, 2, 3, 1, 2, 3, 4])],
)
def test_copied_layers_keep_their_widths(
    method: str, layers: int, origins: list[int], layerwise_folder: str, grow: Grow, tmp_path: Path
) -> None:
    result = grow(layerwise_folder, method=method, layers=layers)
    out = Path(result.out)
    before, after = (json.loads(Path(folder, "config.json").read_text()) for folder in (layerwise_folder, out))
    assert after["num_hidden_layers"] == layers
    found = [layer["base_layers"][0] for layer in result.manifest["layers"]]
    for name in LISTS:
        assert after[name] == [before[name][origin] for origin in found]
    assert found == origins
    assert {*CODE_FILES} <= {path.name for path in out.iterdir()}
    base, grown = loaded(layerwise_folder), loaded(str(out))
    assert result.parameters == sum(parameter.numel() for parameter in grown.parameters())
    assert torch.equal(logits(base, tokens()), logits(grown, tokens())) == (method == "llama-pro")
    for index, layer in enumerate(result.manifest["layers"]):
        source = base.model.layers[origins[index]].state_dict()
        for name, tensor in grown.model.layers[index].state_dict().items():
            zero = layer["kind"] != "old" and name in result.manifest["zeroed"]
            assert torch.equal(tensor, torch.zeros_like(source[name]) if zero else source[name])
    data = make_blocks(str(tmp_path / "blocks"), rows=8, heldout=1)
    run = prepare(TrainConfig(checkpoint=str(out), data=data, out=str(tmp_path / "run"), steps=1, batch=4), gpus=False)
    assert run.parameters == result.parameters


def test_vectors_of_other_lengths_are_not_averaged(grow: Grow, tmp_path: Path) -> None:
    random_model({**small_architecture(), "attention_bias": True}).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"--vectors mean: model.layers.\d.self_attn.q_proj.bias has .*--vectors lower"):
        grow(str(tmp_path / "base"), method="solar", layers=8, vectors="mean")
    grown = grow(str(tmp_path / "base"), method="solar", layers=8)
    assert {*CODE_FILES} <= {path.name for path in Path(grown.out).iterdir()}, "the base itself had none"


def test_inspect_shows_from_where_to_where_sizes_go(
    layerwise_folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ExpandConfig(base=layerwise_folder, out=str(tmp_path / "out"), method="solar", layers=8)
    with open(os.devnull, "w") as nowhere:
        screen = Console(record=True, width=100, file=nowhere)
        monkeypatch.setattr(terminal, "console", screen)
        terminal.show_expansion(laid_out(config))
    text = screen.export_text()
    widths = json.loads(Path(layerwise_folder, "config.json").read_text())["intermediate_sizes"]
    assert f"{min(widths)} … {max(widths)} × 64" in text
    assert f"64 × {min(widths)} … {max(widths)}" in text
