"""`lesa-ray report`: the page of studies as they come, whole and with pieces missing; what is refused."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lesa_ray import Expanded
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.report.page import packages
from lesa_ray.report.page.build import analysis_page, write_report
from lesa_ray.report.page.figure import svgs
from lesa_ray.report.page.measures import orderliness
from lesa_ray.report.page.render import render
from lesa_ray.report.page.sections import make_sections
from lesa_ray.report.page.sources import gather
from tests.report import page_samples as samples
from tests.report.page_reading import Page, sections_of
from tests.test_cli import run

pytest.importorskip("matplotlib")


def killing(call: Callable[..., None]) -> Callable[..., None]:
    """The call, and after each new one of its kind the end of the process."""
    seen: set[str] = set()

    def called(storage: Storage, name: str, *given: object) -> None:
        call(storage, name, *given)
        if name not in seen:
            seen.add(name)
            raise KeyboardInterrupt

    return called


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, set[str], Path]:
    """The page of a comparison with three seeds and two analyses of the same layers; the names of its figures."""
    root = tmp_path_factory.mktemp("page")
    material = gather(
        [
            samples.write(root / "toy", "comparison.json", samples.comparison()),
            samples.write(root / "before", "analysis.json", samples.analysis()),
            samples.write(root / "after", "analysis.json", samples.bare_analysis(checkpoint="m/trained", shift=0.1)),
        ]
    )
    sections, missing = make_sections(material, "lesa-ray report")
    (root / "page.html").write_text(render(material, sections, missing, images=True))
    return Page(root / "page.html"), {figure.name for section in sections for figure in section.figures}, root


def test_every_figure_is_on_the_page(whole: tuple[Page, set[str], Path]) -> None:
    page, names, _ = whole
    comparison = {"final-loss", "loss-after-expansion", "held-out-loss", "cost-at-equal-loss", "tokens-to-loss"}
    analysis = {"norms", "spectra", "ranks", "captured", "neighbours", "analysis-fit", "matched", "pca", "tsne"}
    assert names == {*comparison, *analysis, "residual", "norms-2"}
    assert names <= set(page.ids)
    assert all(f'href="figures/{name}.png"' in page.html for name in names)
    figures = re.findall(r"<figure id=.*?</figure>", page.html, re.DOTALL)
    assert len(figures) == len(names)
    for figure in figures:  # a title, a sentence, a drawing, how to make it again
        assert re.search(r"<h3>[^<]+</h3>", figure)
        assert re.search(r'<p class="see">[^<]{20,}\.</p>', figure)
        assert "<svg" in figure
        assert "<code>lesa-ray" in figure


def test_the_page_stands_alone(whole: tuple[Page, set[str], Path]) -> None:
    page, names, root = whole
    assert page.html.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    beside = {f"figures/{name}.png" for name in names}
    assert all(place.startswith("#") or place in beside for place in page.fetched)
    assert "url(http" not in page.html
    assert "@import" not in page.html
    assert len(page.ids) == len(set(page.ids))  # panels bring ids of their own
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page.html):
        assert target in page.ids
    for svg in re.findall(r"<svg.*?</svg>", page.html, re.DOTALL):
        ET.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    drawn = svgs(sections_of(str(root / "toy"))[2]["cost-at-equal-loss"])
    assert all(svg in page.html for svg in drawn)  # the same bytes again: no clock, no counter


def test_colours_follow_the_browser(whole: tuple[Page, set[str], Path]) -> None:
    page, _, _ = whole
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000", "#ffffff"}
    assert "prefers-color-scheme: dark" in page.html
    assert "@media print" in page.html
    used = set(re.findall(r"var\((--[\w-]+)\)", page.html))
    assert used <= set(re.findall(r"(--[\w-]+):", page.html))
    assert "<text" in drawings  # text is text


def test_sentences_are_computed(whole: tuple[Page, set[str], Path]) -> None:
    page, _, _ = whole
    text = page.words()
    assert "The runs made last had CPU and 2 CPUs on 2026-11-21." in text
    assert "lesa has the lowest held-out loss at the end, in nats a token: 2.6410 (SD 0.0010), 3 seeds." in text
    assert "All others are told apart from it" in text
    assert (
        "The best control is “base, same tokens”, 2.6560 (SD 0.0010); by each method's own 95 % interval clearly "
        "better than it: lesa; clearly worse" in text
    )
    assert "picked from 5 arms" in text
    assert "±14.1 standard errors" in text
    assert re.search(r"llama-pro ends at 2\.6610 in the mean; lesa is there with 1\d % of its tokens", text)
    assert "New layers have 0.4" in text
    assert "A new layer changes the stream by 0.050 of its norm on average, an old one by 0.500" in text
    assert "in trained a new one by 0.150, an old one by 0.600" in text
    assert "aligned mean +0.110" in text
    assert "q_proj exceeds chance most, by 0.100 ± 0.000, and 2 of 2 weight types do clearly." in text
    order = orderliness([[float(i), 0.1 * i * i] for i in range(6) if i != 3])
    assert f"gate_proj, order {order:.2f}" in text


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    content = samples.comparison(notes=["control copy: left out: there is no such method"])
    failed, never = content["arms"][0]["runs"][1], content["arms"][1]["runs"]
    failed |= {
        "status": "failed",
        "problem": "pretrain/x: <b>out of memory</b>\n& more",
        "curve": [],
        "final_loss": None,
    }
    for trial in never:
        trial |= {"status": "missing", "curve": [], "final_loss": None, "loss_before": None}
    for trial in content["arms"][2]["runs"]:
        trial["curve"] = []
    content["base"]["loss"] = None
    bare = samples.analysis(fit=None, residual=None, matched_missing="phi3 has no roles")
    for figures in bare["types"].values():
        figures |= {"neighbour_cosine_matched": None, "neighbour_cosine_chance": None, "norms": [None] * 6}
        figures["pictures"] |= {"tsne": None, "tsne_missing": "scikit-learn is not installed"}
    runs = [
        samples.write(tmp_path / "toy", "comparison.json", content),
        samples.write(tmp_path / "bare", "analysis.json", bare),
    ]
    material = gather(runs)
    sections, missing = make_sections(material, "lesa-ray report")
    (tmp_path / "page.html").write_text(render(material, sections, missing, images=False))
    page = Page(tmp_path / "page.html")
    text = page.words()
    assert "&lt;b&gt;out of memory&lt;/b&gt; &amp; more" in page.html
    for words in (
        "lesa, seed 1 (toy): failed: pretrain/x",
        "llama-pro, seeds 0, 1 and 2 (toy): missing",
        "“base, same tokens”, seeds 0, 1 and 2 (toy): its loss curve is empty",
        "control copy: left out: there is no such method (toy)",
        "Downstream tasks (toy): the comparison measured none",
        "Of grown: norms, the quick fit of the predictors (`--fit`), candidates after matching (`--match`)",
        "Of grown: matched layers: phi3 has no roles",
        "t-SNE of q_proj and gate_proj: scikit-learn is not installed",
        "What the layers of grown add to the residual stream: analysed without text",
    ):
        assert words in text, words
    assert "2 of 3" in text
    assert {"held-out-loss", "final-loss", "pca"} <= set(page.ids)


def test_a_real_expansion_and_its_training(
    tmp_path: Path, bases: Callable[[str], str], grow: Callable[..., Expanded]
) -> None:
    lesa = grow(
        bases("llama"), method="lesa", out=str(tmp_path / "a/grown"), lesa={"epochs": 1, "ridge_yardstick": False}
    )
    copies = grow(bases("llama"), method="llama-pro", out=str(tmp_path / "b/grown"))
    trained = tmp_path / "trained"
    (trained / "training").mkdir(parents=True)
    (trained / "expansion.json").write_text(Path(lesa.out, "expansion.json").read_text())
    rows: list[dict[str, Any]] = [{"step": 0, "heldout_loss": 5.0}]
    rows += [{"step": s, "loss": 5.0 - s / 10, "tokens": 64.0 * s} for s in range(1, 5)]
    lines = [json.dumps(row) for row in [*rows, {"step": 4, "heldout_loss": 4.5}]]
    (trained / "training/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    (trained / "training/run.json").write_text(json.dumps({"summary": {"checkpoint": lesa.out, "steps": 4}}))
    # the arms of a comparison tell where their expansions are
    content = samples.comparison()
    content["arms"][1]["runs"][0]["expansion"] = copies.out
    content["arms"][3]["runs"][0]["expansion"] = f"local://{copies.out}"  # no store's address: anyone may have put it
    study = samples.write(tmp_path / "toy", "comparison.json", content)
    text, missing, figures = sections_of(lesa.out, f"{trained}/expansion.json", study)
    names = figures.keys()
    assert {"plan", "fit-grown", "norm-ratios", "training"} <= names
    assert not any(name.startswith("fit-llama-pro") for name in names)
    assert "fit-trained" not in names  # it is the base's
    assert "trained 5.0000 → 4.5000 (−0.5000)" in text
    assert "2 different plans" in text
    manifest = json.loads(Path(lesa.out, "expansion.json").read_text())
    ratios = [fit["norm_ratio"] for fit in manifest["fit"].values()]
    assert f"have {min(ratios):.2f} to {max(ratios):.2f} times the norm" in text
    assert any(line.startswith("Plan and fit of “random, zero output projections”: the expanded") for line in missing)
    assert "lesa.epochs 1 1 5" in text
    for name in ("plan", "fit-grown", "norm-ratios", "training"):
        assert all("<svg" in svg for svg in svgs(figures[name]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds none of them"),
        ({"comparison.json": "{"}, "is not JSON"),
        ({"comparison.json": '{"kind": "comparison", "version": 2, "arms": []}'}, "version"),
        ({"analysis.json": '{"kind": "comparison", "version": 1, "layers": 3}'}, "kind"),
        ({"analysis.json": '{"kind": "analysis", "version": 1, "layers": "many"}'}, "layers"),
        ({"expansion.json": '{"base": "b"}'}, "not the manifest"),
    ],
)
def test_a_run_that_is_none_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: dict[str, str],
    words: str,
) -> None:
    (tmp_path / "run").mkdir()
    for name, text in content.items():
        (tmp_path / "run" / name).write_text(text)
    code, out, line = run(capsys, monkeypatch, "report", tmp_path / "run", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert line.startswith(f"lesa-ray: RUN {tmp_path}/run")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = samples.write(tmp_path / "toy", "analysis.json", samples.analysis(layers=1, new_layers=()))
    for runs, out, words in (
        ([tmp_path / "none"], tmp_path / "out", "there is no such folder"),
        ([good], tmp_path / "toy/analysis.json", "is a file"),
    ):
        code, _, line = run(capsys, monkeypatch, "report", *runs, "--out", out)
        assert code == 2
        assert words in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/report.html").write_text("my own")
    with pytest.raises(UserError, match="not a report of lesa-ray's"):
        write_report([good], str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["report.html"]
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lesa-ray\[report\]'"):
        write_report([good], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_new_report_takes_the_place_of_an_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = samples.bare_analysis(layers=2, new_layers=())
    good = samples.write(tmp_path / "toy", "analysis.json", small)
    write_report([good], str(tmp_path / "out"))
    for path in (tmp_path / "out/figures").iterdir():
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        assert grey.min() < 100
        assert min(side.min() for side in (grey[0], grey[-1], grey[:, 0], grey[:, -1])) > 250  # nothing is cut off
    (tmp_path / "out/figures/mine.png").write_bytes(b"")
    small["residual"] = None
    samples.write(tmp_path / "toy", "analysis.json", small)
    with monkeypatch.context() as patch:  # killed at each of its writes and removals, it leaves nothing for good
        for name in ("write", "remove"):
            patch.setattr(Storage, name, killing(getattr(Storage, name)))
        while True:
            try:
                write_report([good], str(tmp_path / "out"))
            except KeyboardInterrupt:
                continue
            break
    code, out, _ = run(capsys, monkeypatch, "report", good, "--out", tmp_path / "out", "--json")
    assert code == 0
    told = json.loads(out)
    there = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert there == {Path(name).name for name in told["figures"]} | {"mine.png"}
    assert "residual.png" not in there


def test_the_page_of_an_analysis_alone() -> None:
    html = analysis_page(
        samples.analysis(layers=1, new_layers=(), fit=None, residual=None), "lesa-ray analyze models/grown --out here"
    )
    assert "lesa-ray analyze models/grown" in html
    assert "figures/" not in html
    assert "no comparison was given" not in html
    with pytest.raises(UserError, match="kind"):
        analysis_page({"kind": "table"}, "")


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_place_that_does_not_take_the_page(small_disk: Path, tmp_path: Path) -> None:
    run, out = samples.write(tmp_path / "toy", "analysis.json", samples.bare_analysis()), str(small_disk / "out")
    (small_disk / "all").write_bytes(bytes(60 * 1024))
    with pytest.raises(MachineError, match=f"^OUT {out}: no space left on the device"):
        write_report([run], out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        write_report([run], str(tmp_path / "file"))
