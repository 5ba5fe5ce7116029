"""The benchmark that takes a layer out: the rest of the model is what it was, and the scores tell candidates apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lesa_ray import UserError
from lesa_ray.checkpoint.anatomy import read_anatomy
from lesa_ray.checkpoint.reader import open_checkpoint
from pipelines.benchmark.knockout import ARMS, CHANCE, knock_out, table, without_layer
from tests import families

Bases = Callable[[str], str]


def test_a_model_without_a_layer(bases: Bases, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bases("gemma2"))
    without_layer(checkpoint, read_anatomy(checkpoint), 2, str(tmp_path))
    model = families.load_strict(tmp_path, "gemma2")
    types = checkpoint.config["layer_types"]
    assert model.config.layer_types == [*types[:2], *types[3:]]
    for new, old in enumerate((0, 1, 3, 4)):
        there, here = (
            families.layer_tensors(bases("gemma2"), "gemma2", old),
            families.layer_tensors(tmp_path, "gemma2", new),
        )
        assert all(torch.equal(there[name], here[name]) for name in there)


def test_a_layer_that_is_its_neighbours_copy_is_found_again(bases: Bases, tmp_path: Path) -> None:
    """Layer 2 is layer 1 again: a copy of the lower neighbour is the layer itself, noise is not."""
    base = tmp_path / "base"
    without_layer(open_checkpoint(bases("llama")), read_anatomy(open_checkpoint(bases("llama"))), 4, str(base))
    path = next(base.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    content = load_file(path)
    for name in [name for name in content if ".layers.1." in name]:
        content[name.replace(".layers.1.", ".layers.2.")] = content[name].clone()
    save_file(content, path, metadata={"format": "pt"})
    arms = {name: ARMS[name] for name in ("random", "copy")}
    console = Console(record=True, width=120)
    scores = knock_out(str(base), [2], arms, console)
    for block in ("attention", "mlp"):
        ((cosine, r2),) = scores["copy"][block]
        assert (cosine, r2) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-4))
        for noise in ("random", CHANCE):
            assert (scores[noise][block][0][0] or 0) < 0.7
    console.print(table(scores))
    assert "above chance" in console.export_text()
    with pytest.raises(UserError, match="--layers 3: must lie between two others, 1 to 2"):
        knock_out(str(base), [3], arms, console)
