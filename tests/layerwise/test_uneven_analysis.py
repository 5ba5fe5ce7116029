"""An analysis of layers that differ in width: what is a layer's own stays so, likeness is that of padded layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lesa_ray import Expanded, UserError
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import open_subject, work_on_block
from lesa_ray.checkpoint.blocks import Attention
from lesa_ray.config import LesaSettings
from lesa_ray.distributed.analyze import analyze
from lesa_ray.layerwise.conversion import with_layer_widths
from lesa_ray.lesa.matched import random_like
from lesa_ray.report.analysis import analysis_table
from lesa_ray.report.page.build import analysis_page
from tests import families
from tests.layerwise.models import random_model, small_architecture, write_checkpoint

Q, OUT, GATE, DOWN = (f"{n}.weight" for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"))
EVEN: dict[str, Any] = {"profile": "isotropic", "beta": "1", "alpha": "1"}
WIDTHS, HEADS, GROUPS, HEAD, HIDDEN = (24, 56, 40, 40), (4, 8, 6, 6), 2, 8, 64
PLACES = np.random.default_rng(0).permutation(WIDTHS[1])[: WIDTHS[0]]
"""Where the neurons of layer 0 lie in layer 1, beside others."""
HEAD_PLACES = (2, 0, 7, 5)
"""And its query heads, group by group."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers of three widths, of which the second has all neurons and heads of the first, and more. All its heads
    are turned then: queries and keys in the planes of rotary embeddings, values in any way."""
    raw = with_layer_widths(small_architecture(layers=4, **EVEN), WIDTHS, HEADS)
    model = random_model(raw)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = (np.array(HEAD_PLACES)[:, None] * HEAD + np.arange(HEAD)).reshape(-1)
    for name in (n for n in model.model.layers[0].state_dict() if "proj" in n):
        one, two = (state[f"model.layers.{layer}.{name}"] for layer in (0, 1))
        if "mlp" in name:
            two.movedim(int(name == DOWN), 0)[PLACES] = one.movedim(int(name == DOWN), 0)
        elif name in (Q, OUT):
            two.movedim(int(name == OUT), 0)[rows] = one.movedim(int(name == OUT), 0)
        else:
            two.copy_(one)
        if "self_attn" in name:
            two.copy_(turned(two, GROUPS, name.split(".")[1][0]))
    model.load_state_dict(state)
    return write_checkpoint(tmp_path_factory.mktemp("uneven") / "base", raw, model)


def turned(tensor: torch.Tensor, groups: int, part: str) -> torch.Tensor:
    """All heads of each group turned alike."""
    random = torch.Generator().manual_seed(1)
    angles = torch.rand(groups, HEAD // 2, generator=random) * 6
    half, sine = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    planes = torch.cat([torch.cat([half, -sine], 2), torch.cat([sine, half], 2)], 1)
    free = torch.linalg.qr(torch.randn(groups, HEAD, HEAD, generator=random)).Q
    rows = tensor.T if part == "o" else tensor
    turn = (planes if part in "qk" else free).unsqueeze(1)
    result = (turn @ rows.reshape(groups, -1, HEAD, rows.shape[1])).reshape(rows.shape)
    return result.T if part == "o" else result


@pytest.fixture(scope="module")
def report(base: str) -> dict[str, Any]:
    return analyze(AnalyzeConfig(base=base, lesa=LesaSettings(epochs=1)), use_ray=False)


def stored(base: str, name: str) -> list[np.ndarray[Any, Any]]:
    """A weight type in each layer, float64."""
    state = load_file(Path(base, "model.safetensors"))
    return [state[f"model.layers.{layer}.{name}"].double().numpy() for layer in range(4)]


@pytest.mark.parametrize("name", [Q, OUT, GATE, DOWN, "self_attn.v_proj.weight"])
def test_norms_spectra_and_ranks_are_those_of_each_layer_alone(name: str, base: str, report: dict[str, Any]) -> None:
    found, weights = report["types"][name], stored(base, name)
    assert found["norms"] == pytest.approx([float(np.linalg.norm(weight)) for weight in weights], rel=1e-5)
    for at, weight in enumerate(weights):
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(found["spectra"][at], values, rtol=2e-3)  # all are kept where there are so few
        shares = values / values.sum()
        assert found["effective_rank"][at] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-4)
        assert found["stable_rank"][at] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-4)
    differ = len({weight.shape for weight in weights}) > 1
    assert found["shapes"] == ([list(weight.shape) for weight in weights] if differ else None)
    assert found["shape"] == [max(sizes) for sizes in zip(*(weight.shape for weight in weights), strict=True)]


def test_likeness_as_stored_is_that_of_padded_layers(base: str, report: dict[str, Any]) -> None:
    def wide(weight: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        if name == GATE:
            return np.pad(weight, ((0, max(WIDTHS) - len(weight)), (0, 0)))
        grouped = weight.reshape(GROUPS, -1, HEAD, HIDDEN)
        missing = max(HEADS) // GROUPS - grouped.shape[1]
        return np.pad(grouped, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(-1, HIDDEN)

    for name in (GATE, Q):
        weights = [wide(weight, name) for weight in stored(base, name)]
        expected = [float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairwise(weights)]
        assert report["types"][name]["neighbour_cosine"] == pytest.approx(expected, abs=1e-5)


def test_each_of_the_narrower_is_matched_to_one_of_the_wider(base: str, report: dict[str, Any]) -> None:
    """The whole of layer 0 is found again in layer 1: what is left is the length of what layer 1 has beside."""
    for name in (Q, OUT, GATE, DOWN):
        one, two, *_ = (float(np.linalg.norm(weight)) for weight in stored(base, name))
        found = report["types"][name]
        assert found["neighbour_cosine_matched"][0] == pytest.approx(one / two, rel=1e-5)
        assert found["neighbour_cosine_chance"][0] < 0.8 * one / two
        assert None not in found["neighbour_cosine_matched"]
        assert "matched" not in report["fit"][name]
        assert report["fit"][name]["zero"]["r2"] == 0


def test_the_page_and_the_table_say_so(report: dict[str, Any], tmp_path: Path) -> None:
    said = "ayers differ in width (FFN 24 to 56, query heads 4 to 8): norms, spectra and ranks are of each layer"
    assert said in report["uneven"]
    short = {key: {Q: report[key][Q]} for key in ("types", "fit")}  # a panel of each figure
    assert said in analysis_page({**report, **short}, "lesa-ray analyze base")
    console = Console(width=160, record=True, file=(tmp_path / "log").open("w"))
    console.print(analysis_table(report))
    text = console.export_text()
    assert said in text
    assert "24 … 56 × 64" in text


def test_of_a_grown_model_old_layers_are_scored_as_those_of_its_base(
    bases: Callable[[str], str], grow: Callable[..., Expanded]
) -> None:
    """They have one width, whatever the new ones have."""
    base = bases("qwen3")
    grown = grow(base, method="copy", position="3", new_width=1.5).out
    before, after = (open_subject(AnalyzeConfig(base=folder)) for folder in (base, grown))
    assert (before.widths, before.old_widths, after.new_layers) == (None, set(), [4])
    for piece in before.blocks:
        one, two = (work_on_block(subject, piece, "cpu") for subject in (before, after))
        for name in before.blocks[piece].matrices:
            assert two["neighbours"][name] == [*one["neighbours"][name][:3], None, None]
        assert one["candidates"].keys() == two["candidates"].keys()
        assert all(two["candidates"].values())


def test_layers_of_one_width_whatever_it_is(tmp_path: Path) -> None:
    """Twice as many query heads as config.json's `num_attention_heads`, which no layer has to have."""
    raw = {**small_architecture(layers=3, **EVEN), "num_attention_heads": 4}
    folder = write_checkpoint(tmp_path / "base", raw)
    subject = open_subject(AnalyzeConfig(base=folder))
    assert subject.widths is None
    attention = subject.blocks["attention, matched"]
    assert isinstance(attention, Attention)
    assert (attention.heads, attention.groups, attention.size) == (8, 2, 8)


def test_what_cannot_be_compared_is_refused_without_expands_advice(tmp_path: Path) -> None:
    raw = {**small_architecture(layers=3, **EVEN), "num_key_value_heads_per_layer": [2, 4, 2]}
    folder, plain = write_checkpoint(tmp_path / "kv", raw), families.make("llama_tied", tmp_path / "plain")
    file = Path(plain, "model.safetensors")
    state = {name: t[:8].clone() if name.endswith("0.mlp.up_proj.weight") else t for name, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    for base, why in ((folder, "they have 2 to 4 KV heads"), (plain, r"model.layers.1.mlp.up_proj.weight is F32")):
        with pytest.raises(UserError, match=rf"layers are not alike: {why}.*; analyze needs layers of one") as refused:
            open_subject(AnalyzeConfig(base=base))
        assert "llama-pro" not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_random_layer_has_no_neurons_where_there_is_padding(base: str) -> None:
    """It is the random layer of what is there, and zeros."""
    subject = open_subject(AnalyzeConfig(base=base))
    for block in subject.blocks.values():
        narrow, above = (
            {name: subject.read(layer, subject.anatomy.types[name]) for name in block.matrices} for layer in (0, 1)
        )
        wide, _, _ = subject.evened(block, 1, narrow, above)
        drawn, padded = (random_like([one], block, 3) for one in (narrow, wide))
        for name in block.matrices:
            axis = int(name in (OUT, DOWN))
            there = wide[name].movedim(axis, 0).any(dim=1)
            assert torch.equal(padded[name].movedim(axis, 0)[there], drawn[name].movedim(axis, 0))
            assert not padded[name].movedim(axis, 0)[~there].any()
