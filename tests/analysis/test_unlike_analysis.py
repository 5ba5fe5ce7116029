"""An analysis of a model whose layers are of several kinds: figures of a weight type are of the layers that have it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from lesa_ray import UserError
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import open_subject
from lesa_ray.config import LesaSettings
from lesa_ray.distributed.analyze import analyze
from lesa_ray.report.analysis import analysis_table
from lesa_ray.report.page.build import analysis_page
from tests import families

OUTPUT, EXPERTS = "self_attn.o_proj.weight", "mlp.experts.*.gate_proj.weight"
RECURRENT = "linear_attn.out_proj.weight"
QUICK = LesaSettings(epochs=1)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    return families.make("qwen3_next", tmp_path_factory.mktemp("hybrid"), layers=8)


@pytest.fixture(scope="module")
def report(hybrid: str) -> dict[str, Any]:
    return analyze(AnalyzeConfig(base=hybrid, lesa=QUICK), use_ray=False)


def of_layers(base: str, weight_type: str, layers: list[int]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    return [families.layer_tensors(base, "qwen3_next", i)[weight_type].double().numpy() for i in layers]


@pytest.mark.parametrize(("weight_type", "having"), [(RECURRENT, [0, 1, 2, 4, 5, 6]), (OUTPUT, [3, 7])])
def test_figures_are_of_the_layers_that_have_the_type(
    weight_type: str, having: list[int], hybrid: str, report: dict[str, Any]
) -> None:
    found, weights = report["types"][weight_type], of_layers(hybrid, weight_type, having)
    assert report["layers"] == 8
    expected: list[float | None] = [None] * 8
    for layer, weight in zip(having, weights, strict=True):
        expected[layer] = pytest.approx(float(np.linalg.norm(weight)), rel=1e-5)
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(found["spectra"][layer], values[found["spectrum_index"]], rtol=1e-3, atol=1e-5)
    assert found["norms"] == expected
    absent = [layer for layer in range(8) if layer not in having]
    assert all(found["spectra"][layer] == [] for layer in absent)
    for key in ("effective_rank", "stable_rank"):
        assert [layer for layer in range(8) if found[key][layer] is None] == absent
    for key in ("pca", "tsne"):
        points = found["pictures"][key]
        assert points is None or [layer for layer in range(8) if points[layer] is None] == absent
    cosines: list[float | None] = [None] * 7
    for (one, lower), (other, upper) in pairwise(zip(having, weights, strict=True)):
        if other == one + 1:
            cosine = float((lower * upper).sum() / np.linalg.norm(lower) / np.linalg.norm(upper))
            cosines[one] = pytest.approx(cosine, abs=1e-5)
    assert found["neighbour_cosine"] == cosines


def test_predictors_are_fitted_to_types_in_layers_in_a_row(report: dict[str, Any]) -> None:
    assert EXPERTS in report["fit"]
    assert {OUTPUT, RECURRENT}.isdisjoint(report["fit"])
    assert report["uneven"].startswith("layers are of several kinds: ")
    assert report["uneven"].endswith("no predictor is fitted to 7 weight types, in too few layers in a row")
    assert report["matched_missing"] == "qwen3_next layers cannot be matched: layers are of several kinds"


def test_layers_below_others_are_told_too(tmp_path: Path) -> None:
    base = families.make("deepseek_v3", tmp_path / "base", layers=7)
    subject = open_subject(AnalyzeConfig(base=base))
    assert subject.layers_with("mlp.gate_proj.weight") == [0, 1]
    assert subject.layers_with(EXPERTS) == [2, 3, 4, 5, 6]
    assert {OUTPUT, EXPERTS} < subject.fitted
    assert "mlp.gate_proj.weight" not in subject.fitted
    assert subject.nbytes(EXPERTS) == 5 * 8 * 16 * families.HIDDEN * 4


def test_of_a_grown_model_copies_are_marked(hybrid: str, grow: Any, tmp_path: Path) -> None:
    out = grow(hybrid, method="copy", layers=10, position="2,3", out=str(tmp_path / "out")).out
    grown = analyze(AnalyzeConfig(base=out, fit=False), use_ray=False)
    assert grown["new_layers"] == [3, 5]
    for weight_type, having in ((RECURRENT, [0, 1, 2, 3, 6, 7, 8]), (OUTPUT, [4, 5, 9])):
        found = grown["types"][weight_type]
        assert [layer for layer in range(10) if found["norms"][layer] is not None] == having
        assert found["common_directions"] == min(families.HIDDEN, 64 * (len(having) - 1))
    assert grown["types"][RECURRENT]["neighbour_cosine"][2] == pytest.approx(1)
    assert "layers are of several kinds" in analysis_page(grown, "lesa-ray analyze out")


def test_the_terminal_shows_what_there_is(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=140).print(analysis_table(report))
    text = capsys.readouterr().out
    assert "linear_attn.out_proj" in text
    assert "several kinds" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensor: tensor[:8].clone(),
            r"is F32 \[8, 64\], in a layer below it is F32 \[16, 64\]; .* of one width",
        ),
        (
            lambda tensor: tensor.bfloat16(),
            r"is BF16 \[16, 64\], in a layer below it is F32 .*; analyze needs one dtype",
        ),
    ],
)
def test_a_type_of_several_shapes_or_dtypes_is_refused(
    change: Callable[[Tensor], Tensor], says: str, tmp_path: Path, hybrid: str
) -> None:
    base = Path(shutil.copytree(hybrid, tmp_path / "base"))
    tensors = families.tensors(base)
    name = "model.layers.5.mlp.shared_expert.up_proj.weight"
    save_file({**tensors, name: change(tensors[name])}, base / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} {says}"):
        open_subject(AnalyzeConfig(base=str(base)))


def test_no_fit_where_no_type_lies_in_enough(tmp_path: Path) -> None:
    base = families.make("nemotron_h", tmp_path / "base", layers=8)
    with pytest.raises(UserError, match="three layers in a row; no weight type lies in so many"):
        open_subject(AnalyzeConfig(base=base, fit=True))
