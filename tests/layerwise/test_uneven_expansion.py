"""Depth for models whose layers differ: padded, made by the method, cut to the width of their place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lesa_ray import ExpandConfig, Expanded, UserError
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.registry import METHODS
from lesa_ray.layerwise.conversion import with_layer_widths
from lesa_ray.report import terminal
from tests.families import logits, tensors, tokens
from tests.layerwise.models import loaded, random_model, small_architecture, write_checkpoint

Grow = Callable[..., Expanded]
WIDTHS, HEADS, KV_HEADS, HEAD = (64, 192, 128), (4, 8, 6), 2, 8
NEW_WIDTHS, NEW_HEADS = (128, 192), (6, 8)  # 128 and 160; 6 and 7: to multiples of 64 and of the KV heads
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHORT: dict[str, Any] = {"epochs": 1, "ridge_yardstick": False}


def uneven(**changes: Any) -> dict[str, Any]:
    """config.json of three layers that all differ."""
    raw = small_architecture(profile="isotropic", layers=3, beta="1", alpha="1", **changes)
    return with_layer_widths(raw, WIDTHS, HEADS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("uneven") / "base", uneven())


@pytest.fixture(scope="module")
def padded(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with zero neurons and zero heads in the narrower layers, padded by NumPy."""
    raw = with_layer_widths(uneven(), [max(WIDTHS)] * 3, [max(HEADS)] * 3)
    model = random_model(raw)
    state = {name: tensor.numpy() for name, tensor in tensors(base).items()}
    model.load_state_dict({name: torch.from_numpy(_wide(name, array)) for name, array in state.items()})
    return write_checkpoint(tmp_path_factory.mktemp("padded") / "base", raw, model)


def _wide(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A tensor of the widest layer's shape."""
    if "_proj" not in name or "k_proj" in name or "v_proj" in name:
        return array
    axis = int("o_proj" in name or "down_proj" in name)
    rows = np.moveaxis(array, axis, 0)
    groups = rows.reshape((1 if "mlp" in name else KV_HEADS, -1, *rows.shape[1:]))
    most = (max(WIDTHS) if "mlp" in name else max(HEADS) * HEAD) // len(groups)
    wide = np.zeros((len(groups), most, *rows.shape[1:]), array.dtype)
    wide[:, : groups.shape[1]] = groups
    return np.ascontiguousarray(np.moveaxis(wide.reshape(-1, *rows.shape[1:]), 0, axis))


def _cut(layer: dict[str, torch.Tensor], width: int, heads: int) -> dict[str, torch.Tensor]:
    """A padded layer's matrices with the neurons, and of each group the heads, of largest norm."""
    of = {name: layer[f"{name}.weight"].double().numpy() for name in MATRICES}
    neurons = (of["mlp.gate_proj"] ** 2).sum(1) + (of["mlp.up_proj"] ** 2).sum(1) + (of["mlp.down_proj"] ** 2).sum(0)
    kept = np.sort(np.argsort(-neurons)[:width])
    in_heads = ((of["self_attn.q_proj"] ** 2).sum(1) + (of["self_attn.o_proj"] ** 2).sum(0)).reshape(-1, HEAD).sum(1)
    grouped = in_heads.reshape(KV_HEADS, -1)
    best = np.sort(np.argsort(-grouped, 1)[:, : heads // KV_HEADS], 1) + np.arange(KV_HEADS)[:, None] * grouped.shape[1]
    columns = (best.reshape(-1, 1) * HEAD + np.arange(HEAD)).reshape(-1)
    result = dict(layer)
    for name in MATRICES:
        index = torch.from_numpy(kept if "mlp" in name else columns)
        axis = int(name.endswith(("o_proj", "down_proj")))
        result[f"{name}.weight"] = layer[f"{name}.weight"].index_select(axis, index)
    return result


def layer_of(folder: str, layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): t for name, t in tensors(folder).items() if name.startswith(prefix)}


@pytest.mark.parametrize("method", ["lesa", "avg-deus", "opt-deus", "random"])
def test_a_new_layer_has_the_width_of_its_place(method: str, base: str, grow: Grow) -> None:
    settings = {"lesa": SHORT} if method == "lesa" else {}
    result = grow(base, method=method, layers=5, **settings)
    raw = json.loads(Path(result.out, "config.json").read_text())
    assert raw["intermediate_sizes"] == [64, NEW_WIDTHS[0], 192, NEW_WIDTHS[1], 128]
    assert raw["num_attention_heads_per_layer"] == [4, NEW_HEADS[0], 8, NEW_HEADS[1], 6]
    model = loaded(result.out)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    after = logits(model, tokens())
    assert torch.isfinite(after).all()
    assert torch.equal(after, logits(loaded(base), tokens())) == METHODS[method].zero_init
    assert model.generate(tokens(1, 8), max_new_tokens=4, do_sample=False, eos_token_id=-1).shape == (1, 12)
    for new, old in ((0, 0), (2, 1), (4, 2)):
        before, now = layer_of(base, old), layer_of(result.out, new)
        assert all(torch.equal(before[name], now[name]) for name in before | now)
    if method == "random":  # as large as its neighbours' own entries, whatever they were padded with
        for name in ("mlp.gate_proj.weight", "self_attn.q_proj.weight"):
            sizes = [float(layer_of(base, at)[name].std()) for at in (0, 1)]
            assert float(layer_of(result.out, 1)[name].std()) == pytest.approx(sum(sizes) / 2, rel=0.1)
    kept = result.manifest["widths"]["new"]["1"]
    assert (kept["neurons"]["of"], kept["heads"]["of"], kept["neurons"]["added"]) == (192, 8, 0)
    by = kept["neurons"]["ranked_by"]
    assert ("mlp.down_proj.weight" in by) == (not METHODS[method].zero_init)
    assert not any(name.startswith("width-") for name in result.manifest["fit"])


@pytest.mark.parametrize("method", ["lesa", "avg-deus", "opt-deus"])
def test_it_is_the_method_on_padded_layers_and_then_cut(method: str, base: str, padded: str, grow: Grow) -> None:
    torch.testing.assert_close(logits(loaded(padded), tokens()), logits(loaded(base), tokens()), rtol=1e-5, atol=1e-5)
    settings = {"lesa": {**SHORT, "predictor": "ridge", "ridge": 0.1}} if method == "lesa" else {}
    wide, result = (grow(one, method=method, layers=5, zero_init=False, **settings) for one in (padded, base))
    for layer, width, heads in zip((1, 3), NEW_WIDTHS, NEW_HEADS, strict=True):
        expected, found = _cut(layer_of(wide.out, layer), width, heads), layer_of(result.out, layer)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_later_slots_are_made_from_earlier_ones_as_they_were_before_the_cut(base: str, padded: str, grow: Grow) -> None:
    wide, result = (grow(one, method="avg-deus", layers=6) for one in (padded, base))
    new = result.manifest["new_layers"]
    raw = json.loads(Path(result.out, "config.json").read_text())
    for layer in new:
        sizes = raw["intermediate_sizes"][layer], raw["num_attention_heads_per_layer"][layer]
        expected, found = _cut(layer_of(wide.out, layer), *sizes), layer_of(result.out, layer)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_biases_on_the_private_side_are_cut_along(grow: Grow, tmp_path: Path) -> None:
    raw = {**uneven(), "attention_bias": True, "mlp_bias": True}
    folder = write_checkpoint(tmp_path / "base", raw)
    for vectors in ("mean", "lower", "first"):
        result = grow(folder, method="avg-deus", layers=4, position="1", vectors=vectors, output_scale=0.5)
        loaded(result.out)
        new, below, above = layer_of(result.out, 2), layer_of(folder, 1), layer_of(folder, 2)
        assert result.manifest["widths"]["new"]["2"]["neurons"]["kept"] == "0-191", "all of the widest, in order"
        gate = {"mean": torch.zeros(192), "lower": below["mlp.gate_proj.bias"], "first": torch.zeros(192)}[vectors]
        if vectors == "mean":
            gate[:128] = above["mlp.gate_proj.bias"]
            gate = (gate + below["mlp.gate_proj.bias"]) / 2
        elif vectors == "first":
            gate[:64] = layer_of(folder, 0)["mlp.gate_proj.bias"]
        torch.testing.assert_close(new["mlp.gate_proj.bias"], gate)
        scale = 0.5 * {"mean": 0.5 * (below["mlp.down_proj.bias"] + above["mlp.down_proj.bias"]),
                       "lower": below["mlp.down_proj.bias"],
                       "first": layer_of(folder, 0)["mlp.down_proj.bias"]}[vectors]  # fmt: skip
        torch.testing.assert_close(new["mlp.down_proj.bias"], scale)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.pads])
def test_methods_that_match_neurons_refuse_in_one_line(method: str, base: str, grow: Grow) -> None:
    with pytest.raises(UserError, match=r"layers are not alike: model.layers.1.*llama-pro and solar$") as refused:
        grow(base, method=method, layers=5)
    assert "\n" not in str(refused.value)


def test_layers_of_different_kv_heads_are_not_mixed(grow: Grow, tmp_path: Path) -> None:
    raw = {**uneven(), "num_key_value_heads_per_layer": [2, 4, 2]}
    folder = write_checkpoint(tmp_path / "base", raw)
    with pytest.raises(UserError, match=r"they have 2 to 4 KV heads, .*whole layers can be copied by llama-pro"):
        grow(folder, method="avg-deus", layers=5, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert grow(folder, method="llama-pro", layers=5).layers == 5


def test_inspect_shows_the_new_layers_widths(base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    laid_out = prepare(ExpandConfig(base=base, out=str(tmp_path / "out"), method="avg-deus", layers=5))
    with open(os.devnull, "w") as nowhere:
        screen = Console(record=True, width=100, file=nowhere)
        monkeypatch.setattr(terminal, "console", screen)
        terminal.show_expansion(laid_out)
    text = screen.export_text()
    assert re.search(r"new FFN widths +128, 192\b", text)
    assert re.search(r"new query heads +6, 8\b", text)
    assert "64 … 192 × 64" in text
    described = terminal.describe(laid_out)["result"]
    assert described["ffn"] == [64, 128, 192, 192, 128]
    assert described["parameters"] == sum(
        int(np.prod(tensor.shape)) for shard in laid_out.shards for tensor in shard.tensors
    )
    assert Storage(str(tmp_path / "out")).is_empty()


def test_variants_must_differ_from_layer_to_layer_as_the_base_does(base: str, grow: Grow, tmp_path: Path) -> None:
    settings = {"method": "lesa", "layers": 4, "lesa": SHORT}
    same = write_checkpoint(tmp_path / "same", uneven(), random_model(uneven(), seed=1))
    plain, result = (grow(base, **settings, variants=variants) for variants in ((), (same,)))
    fit = result.manifest["fit"]["mlp.down_proj.weight"]
    assert (fit["checkpoints"], fit["d2"]) == (2, max(WIDTHS))
    assert not torch.equal(layer_of(plain.out, 2)["mlp.up_proj.weight"], layer_of(result.out, 2)["mlp.up_proj.weight"])
    other = write_checkpoint(tmp_path / "other", with_layer_widths(uneven(), (64, 128, 192), HEADS))
    with pytest.raises(UserError, match=r"^--variants .*: model.layers.1.mlp.down_proj.weight is \[64, 128\], in BASE"):
        grow(base, **settings, variants=(other,))
