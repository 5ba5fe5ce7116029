"""An analysis from start to end: the document, what is fitted and matched, and how a run that was killed goes on."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lesa_ray import MachineError, UserError
from lesa_ray.analysis import subject as subject_module
from lesa_ray.analysis.heldout import held_out_fit
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import open_subject
from lesa_ray.checkpoint.storage import WORK_DIR, Storage
from lesa_ray.config import LesaSettings
from lesa_ray.distributed import analyze as analyze_module
from lesa_ray.distributed.analyze import analyze
from lesa_ray.errors import KeptError
from lesa_ray.lesa.fit import fit_weight_type
from lesa_ray.report.analysis import analysis_table
from lesa_ray.report.page.schema import Analysis
from tests import families
from tests.evaluation import tiny

Bases = Callable[[str], str]
Q, DOWN = "self_attn.q_proj.weight", "mlp.down_proj.weight"


def look(base: str, **settings: Any) -> dict[str, Any]:
    return analyze(AnalyzeConfig(base=base, **settings), use_ray=False)


def norms(base: str, name: str, weight_type: str, layers: int = families.LAYERS) -> list[float]:
    found = [families.layer_tensors(base, name, i)[weight_type].double().numpy() for i in range(layers)]
    return [float(np.linalg.norm(weight)) for weight in found]


def test_an_expanded_checkpoint_is_told_whole(bases: Bases, grow: Callable[..., Any], tmp_path: Path) -> None:
    out = grow(bases("llama"), method="lesa", layers=7, position="1,3", lesa={"epochs": 1}).out
    report = look(out, out=str(tmp_path / "seen"), page=False, lesa=LesaSettings(epochs=1))
    assert json.loads((tmp_path / "seen" / "analysis.json").read_text()) == report
    assert [file.name for file in (tmp_path / "seen").iterdir()] == ["analysis.json"]
    assert (report["kind"], report["version"], report["family"]) == ("analysis", 1, "llama")
    assert (report["layers"], report["hidden_size"], report["new_layers"]) == (7, families.HIDDEN, [2, 5])
    assert report["identity"]["weights"].keys() == {file.name for file in Path(out).glob("*.safetensors")}
    assert len(report["types"]) == 7
    for name, found in report["types"].items():
        assert found["norms"] == pytest.approx(norms(out, "llama", name, 7), rel=1e-5)
        assert len(found["spectra"]) == len(found["effective_rank"]) == len(found["pictures"]["tsne"]) == 7
        for key in ("neighbour_cosine", "neighbour_cosine_matched", "neighbour_cosine_chance"):
            assert len(found[key]) == 6
        assert {"predictor", "mean", "zero", "ridge", "matched"} < report["fit"][name].keys()
        assert report["fit"][name]["zero"]["r2"] == 0
        assert {"lower", "upper", "mean", "aligned mean", "random"} <= report["fit"][name]["matched"].keys()
    assert report["residual"] is None
    assert report["matched_missing"] is None
    Analysis.model_validate(report)  # what the page reads


def printed(report: dict[str, Any], log: Path) -> str:
    with log.open("w") as file:
        Console(width=200, file=file).print(analysis_table(report))
    return log.read_text()


def test_copies_say_nothing_of_a_grown_model(
    bases: Bases, grow: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said of the base is said of its old layers in a grown model."""
    settings = {"match": False, "lesa": LesaSettings(epochs=1, ridge_yardstick=False)}
    grown = look(grow(bases("llama"), method="llama-pro", layers=7, position="1,3").out, **settings)
    base = look(bases("llama"), **settings)
    assert grown["new_layers"] == [2, 5]
    old = [0, 1, 3, 4, 6]
    assert grown["fit"] == base["fit"]
    for name, found in grown["types"].items():
        own = base["types"][name]
        assert (found["captured"], found["common_spectrum"]) == (own["captured"], own["common_spectrum"])
        plane, expected = np.array(found["pictures"]["pca"]), np.array(own["pictures"]["pca"])
        np.testing.assert_allclose(plane[old], expected, atol=1e-4 * np.abs(expected).max())
        if name not in (DOWN, "self_attn.o_proj.weight"):  # zero in a new layer
            np.testing.assert_allclose(plane[[2, 5]], plane[[1, 4]], atol=1e-4 * np.abs(expected).max())
    text = printed(grown, tmp_path / "grown")
    assert "means over the old layers" in text
    for found in grown["types"].values():
        for layer in grown["new_layers"]:
            for key in ("norms", "effective_rank", "stable_rank"):
                found[key][layer] = 1e6
            for pair in (layer - 1, layer):
                found["neighbour_cosine"][pair] = 1.0
    assert printed(grown, tmp_path / "changed") == text
    monkeypatch.setattr(subject_module.Subject, "new_layers", [1, 2, 3])
    why = open_subject(AnalyzeConfig(base=bases("llama"))).why_not_fitted
    assert why is not None
    assert "there are 2 old layers of a grown model" in why
    grown |= {"fit": None, "fit_missing": why}
    assert why in " ".join(printed(grown, tmp_path / "few").split())


def test_the_fit_is_lesas_own(bases: Bases) -> None:
    base, settings = bases("llama"), LesaSettings(epochs=2)
    weights = [families.layer_tensors(base, "llama", i)[Q] for i in range(families.LAYERS)]
    expected = fit_weight_type(weights.__getitem__, len(weights), [], lambda slot, weight: None, settings, 3)
    found = look(base, lesa=settings, seed=3, match=False)["fit"][Q]
    assert expected.held_out is not None
    assert (found["on"], found["triples"]) == ("held-out layers", expected.triples_held_out)
    for name, score in expected.held_out.items():
        assert found[name]["r2"] == pytest.approx(score.r2, rel=1e-4)
    assert found["ridge"] != found["predictor"]


def test_three_layers_are_scored_on_what_they_were_trained_on() -> None:
    layers, settings = list(torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))), LesaSettings(epochs=2)
    expected = fit_weight_type(layers.__getitem__, 3, [], lambda slot, weight: None, settings, 3).trained
    found = held_out_fit([layers.__getitem__], 3, settings, 3)
    assert (found.pop("on"), found.pop("triples")) == ("training layers", 1)
    assert found == {name: asdict(score) for name, score in expected.items()}


@pytest.mark.parametrize(
    ("name", "weight_type", "shape", "members"),
    [
        ("gpt2", "mlp.c_fc.weight", [256, 64], 1),
        ("mixtral", "block_sparse_moe.experts.*.w1.weight", [96, 4 * 64], 4),
        ("bert", "attention.self.query.weight", [64, 64], 1),
        ("phi3", "mlp.gate_up_proj.weight", [192, 64], 1),
    ],
)
def test_other_families(name: str, weight_type: str, shape: list[int], members: int, bases: Bases) -> None:
    report = look(bases(name), fit=False)
    found = report["types"][weight_type]
    assert (found["shape"], found["members"]) == (shape, members)
    layer = families.layer_tensors(bases(name), name, 2)
    patterns = weight_type.replace("*", "{}")
    parts = [layer[patterns.format(e)] for e in range(members)]
    plain = torch.cat([part.T if name == "gpt2" else part for part in parts], 1).double().numpy()
    values = np.linalg.svd(plain, compute_uv=False)
    np.testing.assert_allclose(found["spectra"][2], values[found["spectrum_index"]], rtol=1e-4)
    assert (report["matched_missing"] is None) == (name != "mixtral")
    assert (found["neighbour_cosine_matched"] is None) == (name == "mixtral")
    assert report["fit"] is None or "predictor" not in report["fit"][weight_type]


def test_large_models_are_not_fitted_or_matched_unasked(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_module, "SMALL", 1000)
    plain = open_subject(AnalyzeConfig(base=bases("llama")))
    assert (plain.fitted, plain.blocks, plain.why_not_matched) == (frozenset(), {}, "not asked for")
    asked = open_subject(AnalyzeConfig(base=bases("llama"), fit=True, match=True))
    assert asked.fitted
    assert len(asked.blocks) == 2
    for subject in (plain, asked):
        pieces = [*subject.types, *subject.blocks]
        assert all(subject.memory(piece) > subject.nbytes(Q) // 2 for piece in pieces)


def test_layers_that_a_budget_does_not_keep_are_not_asked_for(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of main memory, for a task on a cluster."""
    plain = open_subject(AnalyzeConfig(base=bases("llama"), fit=False, match=False))
    stored = plain.nbytes(Q)
    roomy = open_subject(AnalyzeConfig(base=bases("llama"), fit=False, match=False, memory_budget=10**9))
    assert plain.memory(Q) == roomy.memory(Q)
    monkeypatch.setattr(subject_module, "KEPT_SHARE", stored / 10**9)
    assert roomy.memory(Q) == plain.memory(Q)
    monkeypatch.setattr(subject_module, "KEPT_SHARE", (stored - 1) / 10**9)
    assert roomy.memory(Q) == plain.memory(Q) - stored
    tiny_budget = open_subject(AnalyzeConfig(base=bases("llama"), fit=False, match=False, memory_budget=10_000))
    assert 0 < tiny_budget.memory(Q) < plain.memory(Q)


def test_layers_are_read_once_where_there_is_room(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    base, reads = bases("llama"), []
    read = subject_module.Subject.read
    monkeypatch.setattr(
        subject_module.Subject, "read", lambda self, layer, one: reads.append(one.name) or read(self, layer, one)
    )
    roomy = look(base, fit=False, match=False)
    assert len(reads) == 7 * families.LAYERS
    reads.clear()
    tight = look(base, fit=False, match=False, memory_budget=10_000)
    assert len(reads) > 2 * 7 * families.LAYERS
    assert tight["types"] == roomy["types"]


def test_a_killed_run_goes_on(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"fit": False, "match": False, "page": False, "out": str(tmp_path / "out")}
    read = subject_module.Subject.read

    def failing(self: Any, layer: int, one: Any) -> torch.Tensor:
        if one.name == Q:
            raise OSError("the disk is gone")
        return read(self, layer, one)

    with monkeypatch.context() as patch:
        patch.setattr(subject_module.Subject, "read", failing)
        with pytest.raises(MachineError, match="the disk is gone"):
            look(bases("llama"), **settings)
    kept = [file.name for file in (tmp_path / "out" / WORK_DIR).rglob("*.json")]
    assert kept
    assert f"{Q}.json" not in kept
    seen: list[str] = []
    monkeypatch.setattr(
        subject_module.Subject, "read", lambda self, layer, one: seen.append(one.name) or read(self, layer, one)
    )
    report = look(bases("llama"), **settings)
    assert not {f"{name}.json" for name in seen} & set(kept)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["analysis.json"]
    assert report["types"] == look(bases("llama"), fit=False, match=False)["types"]


@pytest.mark.parametrize("file", ["self_attn.q_proj.weight.json", "analysis.html"])
def test_a_disk_that_fills_up_is_outs_and_what_is_finished_stays(
    file: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = Storage.write, str(tmp_path / "out")

    def filling(self: Storage, name: str, data: Any, *more: Any, **named: Any) -> Any:
        if name.endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, data, *more, **named)

    monkeypatch.setattr(Storage, "write", filling)
    with pytest.raises(MachineError, match=f"--out {re.escape(out)}: no space left .*the same command goes on"):
        look(bases("llama"), fit=False, match=False, out=out)
    assert list((tmp_path / "out" / WORK_DIR).rglob("*.json"))


def test_what_is_finished_outlives_a_forward_pass_that_cannot_be(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is too small for it ends the command; with other settings of that pass it takes up what is there."""
    settings = {"fit": False, "match": False, "page": False, "out": str(tmp_path / "out")}
    data = (_blocks(tmp_path),)
    pieces = analyze_module._Work.pieces.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(analyze_module._Work, "pieces", property(lambda self: pieces(self)[::-1]))

    def too_large(*_: Any) -> Any:
        raise UserError("does not fit into the GPU's memory; give a shorter --window")

    with monkeypatch.context() as patch:
        patch.setattr("lesa_ray.analysis.residual.measure_residual", too_large)
        with pytest.raises(KeptError, match="does not fit"):
            look(base := tiny.checkpoint(tmp_path / "base"), data=data, **settings)
    (shelf,) = (tmp_path / "out" / WORK_DIR).iterdir()
    assert len(list(shelf.iterdir())) == 7
    with pytest.raises(KeptError, match="no GPU here"):
        look(base, data=data, window=4, device="cuda", **settings)
    other = shelf.with_name("analysis-0123456789abcdef")  # as other settings would leave it
    other.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(subject_module.Subject, "read", lambda *_: pytest.fail("is read again"))
        report = look(base, data=data, window=4, **settings)
    assert report["residual"]["window"] == 4
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["analysis.json"]


@pytest.mark.parametrize("kept", [True, False])
def test_nothing_stays_of_weights_that_are_wrong(
    kept: bool, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, layer: int, one: Any) -> torch.Tensor:
        if one.name == Q or not kept:
            raise UserError("holds NaN")
        return read(self, layer, one)

    read = subject_module.Subject.read
    monkeypatch.setattr(subject_module.Subject, "read", failing)
    with pytest.raises(UserError, match=r"^holds NaN$"):
        look(bases("llama"), fit=False, match=False, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_from_a_store_to_a_store(s3: str, tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    url = f"{s3}/analyzed"
    Storage(s3).fs.put(base, f"{url}/base", recursive=True)
    settings = {"fit": False, "match": False, "page": False}
    there = look(f"{url}/base", out=f"{url}/seen", data=(blocks := _blocks(tmp_path),), **settings)
    here = look(base, data=(blocks,), **settings)
    assert (there["types"], there["residual"]) == (here["types"], here["residual"])
    assert json.loads(Storage(f"{url}/seen").read("analysis.json")) == there
    assert list(Storage(f"{url}/seen").list()) == ["analysis.json"]
    assert not Storage(f"{url}/seen").folders()


def _blocks(folder: Path) -> str:
    return tiny.blocks(str(folder / "blocks"), "text", 8, [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8]}])


def test_what_is_printed_names_every_type_and_layer(bases: Bases, tmp_path: Path) -> None:
    report = look(bases("llama"))
    report["residual"] = {
        "tokens": 9,
        "data": "some.txt",
        "unsplit": "it scales",
        "layers": [{"attention": None, "mlp": None, "block": 0.5, "cosine": 0.875}] * families.LAYERS,
    }
    report["types"][DOWN]["neighbour_cosine"] = [None] * 4
    console = Console(width=160, record=True, file=(tmp_path / "log").open("w"))
    console.print(analysis_table(report))
    text = console.export_text()
    assert all(name.removesuffix(".weight") in text for name in report["types"])
    assert "0.1250" in text
    assert "it scales" in text
    assert "by chance" in text


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="nothing would be held out"):
        AnalyzeConfig(base="x", fit=True, lesa=LesaSettings(holdout=0))


def test_two_layers_are_enough_but_for_a_fit(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "two", layers=2)
    report = look(base)
    assert "predictor" not in (report["fit"] or {}).get(Q, {})
    assert "too few" in report["types"][Q]["pictures"]["tsne_missing"]
    with pytest.raises(UserError, match="three layers in a row"):
        look(base, fit=True)
