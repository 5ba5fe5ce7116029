"""`lesa-ray report`: the page of studies as they come, whole and with pieces missing; what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lesa_ray import Expanded
from lesa_ray.errors import MachineError, UserError
from lesa_ray.report.page import build as build_module
from lesa_ray.report.page.build import analysis_page, write_report
from lesa_ray.report.page.compared import views, with_untrained
from lesa_ray.report.page.curves import reached_figure, saving_figure
from lesa_ray.report.page.figure import Figure, Panel, svgs
from lesa_ray.report.page.fit import ratios_figure
from lesa_ray.report.page.measures import orderliness
from lesa_ray.report.page.ranking import final_figure, verdict
from lesa_ray.report.page.render import render
from lesa_ray.report.page.residual import pair_up
from lesa_ray.report.page.schema import Analysis, Comparison
from lesa_ray.report.page.sections import make_sections
from lesa_ray.report.page.sources import Expansion, Training, gather
from lesa_ray.report.page.tasks import published_lines
from lesa_ray.report.page.trained import training_figure
from tests.report import page_samples as samples
from tests.test_cli import run

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its text, ids and links; wrong nesting is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        self.fetched += [str(named[name]) for name in ("src", "xlink:href", "href", "srcset") if named.get(name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def sections_of(*runs: str) -> tuple[str, list[str], dict[str, Figure]]:
    """All sentences of a page that is not drawn, what it says is missing, and its figures by name."""
    material = gather(runs)
    sections, missing = make_sections(material, "lesa-ray report")
    figures = {figure.name: figure for section in sections for figure in section.figures}
    verdicts = [sentence for _, one in material.comparisons for sentence in verdict(with_untrained(one))]
    tables = [" ".join(row) for section in sections for _, table in section.tables for row in table.rows]
    texts = [text for section in sections for text in section.texts]
    said = [*verdicts, *texts, *(figure.see for figure in figures.values()), *tables]
    return " ".join(said), missing, figures


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


def test_neighbours_of_a_grown_model_are_old(tmp_path: Path) -> None:
    content = samples.analysis(new_layers=(3,))
    for figures in content["types"].values():
        figures["neighbour_cosine"] = [0.01, -0.03, 0.9, 0.9, 0.01]
        figures["pictures"]["pca"][3] = [50.0, -50.0]
    said, _, figures = sections_of(samples.write(tmp_path / "grown", "analysis.json", content))
    assert "no weight type is alike between old layers (mean cosines within ±0.02)" in said
    assert [row[1] for row in figures["neighbours"].table.rows] == ["−0.003", "−0.003"]
    order = orderliness([[float(i), 0.1 * i * i] for i in (0, 1, 2, 4, 5)])
    assert f"consecutive old layers are {order:.2f} times" in figures["pca"].see
    assert "energy over old layers" in figures["captured"].see
    assert any("one of them new" in entry.label for entry in figures["neighbours"].legend)
    content |= {"new_layers": [1, 3, 4], "fit": None, "fit_missing": "a predictor learns from three layers in a row"}
    said, missing, _ = sections_of(samples.write(tmp_path / "between", "analysis.json", content))
    assert "No two old layers lie side by side" in said
    assert "Of grown: the quick fit: a predictor learns from three layers in a row." in missing


def test_random_weights_have_no_structure(tmp_path: Path) -> None:
    """A fresh model's figures scatter: of seven types one is always above chance, one always looks orderly."""
    rng = np.random.default_rng(0)
    said = ""
    for number in range(8):
        content = samples.analysis(layers=8, new_layers=())
        one = content["types"].popitem()[1]
        names = [f"type{at}.weight" for at in range(7)]
        content["types"] = {
            name: {
                **one, "neighbour_cosine": [0.0] * 7, "neighbour_cosine_matched": rng.normal(0.2, 0.02, 7).tolist(),
                "neighbour_cosine_chance": rng.normal(0.2, 0.02, 7).tolist(), "norms": [1.0] * 8,
                "pictures": {**one["pictures"], "pca": rng.normal(size=(8, 2)).tolist()},
            }
            for name in names
        }  # fmt: skip
        kinds = ("lower", "upper", "mean", "random")
        scores = [{kind: {"cosine": rng.normal(0.2, 0.01)} for kind in kinds} for _ in names]
        content["fit"] = {name: {"matched": found} for name, found in zip(names, scores, strict=True)}
        figures = sections_of(samples.write(tmp_path / str(number), "analysis.json", content))[2]
        said += " ".join(figures[name].see for name in ("neighbours", "matched", "pca"))
        assert "order" not in figures["tsne"].see
        assert figures["tsne"].table is None
    assert said.count("no weight type clearly exceeds chance") >= 7
    assert said.count("none of them is clearly nearer than chance") >= 7
    assert said.count("No weight type follows the depth more than chance has it") >= 7


def test_cost_at_equal_loss_is_told_seed_by_seed(tmp_path: Path) -> None:
    """The second seed's data is harder for both arms. Each run of lesa ends just below llama-pro's of its seed."""
    content = samples.comparison()
    for arm in content["arms"]:
        for trial in arm["runs"]:
            shift = 0.2 * (trial["seed"] == 1) - (2.6404 - 2.660 if arm["name"] == "lesa" else 0.0)
            trial["curve"] = [{**at, "loss": at["loss"] + shift} for at in trial["curve"]]
            trial["final_loss"] = trial["curve"][-1]["loss"]
    said, _, figures = sections_of(samples.write(tmp_path / "c", "comparison.json", content))
    assert "llama-pro ends at 2.7277 in the mean;" in said
    assert "not reached by every seed of “random, zero output projections”" in said  # and of no other
    table = figures["cost-at-equal-loss"].table
    assert table is not None
    assert table.rows[0] == ("lesa", "93 % (SD 0 %)", "74 % (SD 0 %)", "93 % (SD 0 %)")


def test_the_second_half_is_that_of_the_arms(tmp_path: Path) -> None:
    """A control of equal compute trains three times as long: it would be alone in its second half."""
    content = samples.comparison()
    content["arms"].append(copy.deepcopy(content["arms"][2]) | {"name": "base, same compute"})
    for trial in content["arms"][-1]["runs"]:
        trial["curve"] += [
            {**at, "step": 40 + at["step"], "tokens": 4000 + 2 * at["tokens"]} for at in trial["curve"][1:]
        ]
    _, _, figures = sections_of(samples.write(tmp_path / "c", "comparison.json", content))
    assert tokens_shown(figures["held-out-loss"]) == (2000, 4080)
    content["arms"] = content["arms"][2:]  # controls alone, so far
    _, _, figures = sections_of(samples.write(tmp_path / "begun", "comparison.json", content))
    assert tokens_shown(figures["held-out-loss"]) == (6000, 12240)


def tokens_shown(figure: Figure) -> tuple[float, float]:
    """Of which tokens the last panel is."""
    from matplotlib.figure import Figure as Canvas

    axes = Canvas().add_subplot()
    figure.panels[-1].draw(axes)
    return axes.get_xlim()


def test_the_reference_is_asked_when_it_was_first_there(tmp_path: Path) -> None:
    """Its curve turns up after a third of its run, and so does that of an arm just like it."""
    content = samples.comparison(seeds=(0,))
    for arm in content["arms"]:
        trial = arm["runs"][0]
        trial["curve"] = [
            {**at, "loss": loss} for at, loss in zip(trial["curve"], (3.0, 2.5, 2.6, 2.7, 2.75), strict=True)
        ]
        trial["final_loss"] = 2.75
    _, _, figures = sections_of(samples.write(tmp_path / "c", "comparison.json", content))
    table, see = figures["cost-at-equal-loss"].table, figures["cost-at-equal-loss"].see
    assert table is not None
    assert table.rows[1] == ("base, same tokens", "100 %", "100 %", "100 %")
    assert "lesa is there with 100 % of its tokens" in see
    assert see.endswith("; with one seed, whether another would say the same is not known.")
    content["arms"][1]["runs"][0]["final_loss"] = 3.0  # no lower than it began
    _, missing, figures = sections_of(samples.write(tmp_path / "none", "comparison.json", content))
    assert "cost-at-equal-loss" not in figures
    assert any(line.startswith("Cost at equal loss (toy): the reference did not improve") for line in missing)


def test_cost_is_that_of_the_arm_by_which_the_comparison_measures(tmp_path: Path) -> None:
    content = samples.comparison(reference="lesa")
    said, _, figures = sections_of(samples.write(tmp_path / "c", "comparison.json", content))
    assert "Cost of reaching lesa's final loss" in figures["cost-at-equal-loss"].title
    assert "lesa ends at " in said


def test_tokens_to_a_loss_are_told_seed_by_seed(tmp_path: Path) -> None:
    """A loss that is named is the same for all seeds; lesa's third run ends above it. Its own arm is always there."""
    content = samples.comparison()
    path = tmp_path / "toy"
    see = sections_of(samples.write(path, "comparison.json", content))[2]["tokens-to-loss"].see
    end = content["arms"][0]["runs"]
    assert [run["final_loss"] <= 2.6415 for run in end] == [True, True, False]
    assert see == (
        "First at what llama-pro ended at with the same seed (2.6610 in the mean) is lesa, after 528 tokens; 1 arm did "
        "not come there with every seed."
    )
    content["arms"][0]["runs"] = end[:1]
    see = sections_of(samples.write(path, "comparison.json", content))[2]["tokens-to-loss"].see
    assert "First at a loss of 2.6415 is lesa" in see
    content["reached"] = [{"loss": 2.641, "of": "lesa"}]
    see = sections_of(samples.write(path, "comparison.json", content))[2]["tokens-to-loss"].see
    assert see == "No arm comes to one of these losses with every seed, but those that ended there."


def test_a_model_with_gates_costs_no_less(tmp_path: Path) -> None:
    sentences = []
    for tokens in (None, 3000):
        content = samples.comparison()
        content["arms"][0]["inserted_tokens"] = tokens
        _, _, figures = sections_of(samples.write(tmp_path / f"toy{tokens}", "comparison.json", content))
        sentences.append(figures["cost-at-equal-loss"].see)
    assert "lesa is there with 13 % of its tokens" in sentences[0]
    assert "“base, same tokens” is there with 30 % of its tokens" in sentences[1]


def test_one_seed_is_no_finding(tmp_path: Path) -> None:
    text, missing, _ = sections_of(samples.write(tmp_path, "comparison.json", samples.comparison(seeds=(0,))))
    assert "There is one seed: no spread is known, and the order of the arms is not a finding." in text
    assert "told apart" not in text
    assert any(line.startswith("A spread over seeds") for line in missing)
    assert any("analyze CHECKPOINT" in line for line in missing)


def test_layers_that_come_in_slowly_are_named_where_their_losses_stand(tmp_path: Path) -> None:
    content = samples.comparison(remarks=["lesa: its new layers come in over the first 400 tokens"])
    content["arms"][0]["inserted_tokens"] = 400
    rows = [{"step": step, "loss": 2.5, "tokens": 100.0 * step, "inserted": min(1.0, step / 4)} for step in (1, 2, 4)]
    text, _, figures = sections_of(samples.write(tmp_path / "toy", "comparison.json", content))
    assert "lesa: its new layers come in over the first 400 tokens." in text
    assert "New layers of lesa come in during training, and are not yet in here." in text
    assert "2.6700 (new layers not yet in)" in text
    assert "new layers of lesa are all in only after 400 tokens" in figures["held-out-loss"].see
    for known, says in ((rows, "New layers of run are all in after 400 tokens"), (rows[:2], "are not all in yet")):
        figure = training_figure([Training("run", "run", known, {}, {})])
        assert figure is not None
        assert says in figure.see


def test_a_run_that_did_not_end_well_is_told_from_one_that_did() -> None:
    """Every step is drawn, a spike too."""
    steps = [{"step": s, "loss": 9.0 if s == 33 else 3.0 - s / 100, "tokens": 10.0 * s} for s in range(1, 101)]
    rows = [{"step": 0, "heldout_loss": 3.0}, *steps, {"step": 50, "heldout_loss": 2.5}]
    ended, result = [*rows, {"step": 100, "heldout_loss": 2.0}], {"steps": 100}
    lost = [*rows, {"step": 75, "heldout_loss": None}, {"step": 100, "heldout_loss": None}]
    for known, done, says in (
        (ended, result, ["run 3.0000 → 2.0000 (−1.0000)."]),
        (rows[:41], {}, ["run has not ended: it stopped, or is, at step 40 of 100."]),
        (lost, result, ["not known. From step 75 the held-out loss of run is not a number."]),
        (ended, {}, ["run 3.0000 → 2.0000 (−1.0000)."]),  # all but its checkpoint is there
    ):
        figure = training_figure([Training("run", "run", known, {"steps": 100}, done)])
        assert figure is not None
        assert all(figure.see.endswith(one) for one in says), figure.see
        assert drawn(figure.panels[1]).get_ylim()[1] > (9 if len(known) > 50 else 2)


def test_arms_within_the_spread_are_not_told_apart(tmp_path: Path) -> None:
    content = samples.comparison()
    for seed, loss in enumerate((2.635, 2.641, 2.66)):
        content["arms"][1]["runs"][seed]["final_loss"] = loss
    text, _, _ = sections_of(samples.write(tmp_path, "comparison.json", content))
    assert "llama-pro is not told apart from it" in text


def test_an_arm_that_lost_seeds_is_not_the_best(tmp_path: Path) -> None:
    """What is left of the two of them has the lowest mean."""
    content = samples.with_tasks(samples.comparison())
    for arm, seed in ((1, 2), (2, 0)):
        for trial in content["arms"][arm]["runs"]:
            trial["final_loss"] = 2.5 if trial["seed"] == seed else None
            trial["tasks"]["wikitext"] = 1.0
    text, _, figures = sections_of(samples.write(tmp_path / "toy", "comparison.json", content))
    assert "lesa has the lowest held-out loss at the end, in nats a token: 2.6410" in text
    assert "llama-pro and “base, same tokens” are not ranked: a seed that others have is lacking." in text
    assert re.search(r"llama-pro 2\.5000 −0\.1420, not ranked, one seed 1 of 3", text)
    assert "The best control is “random, zero output projections”" in text
    assert figures["tasks"].see.startswith("lesa has the best mean in 3 of 3 tasks")
    table = figures["final-loss"].table
    assert table is not None
    names = [row[0] for row in table.rows]
    assert (names[0], set(names[-2:])) == ("lesa", {"llama-pro", "base, same tokens"})
    for trial in content["arms"][0]["runs"][:2] + content["arms"][3]["runs"][1:]:
        trial["final_loss"] = None
    text, _, figures = sections_of(samples.write(tmp_path / "none", "comparison.json", content))
    assert "No arm has every seed that others have, so there is no ranking yet." in text
    assert len(svgs(figures["final-loss"])) == 2


def test_the_untrained_base_is_a_control(tmp_path: Path) -> None:
    """It lies below all arms but lesa, and above lesa by less than lesa's interval: 0.0015 ± 0.0025, and for all pairs
    of five arms ± 0.0081."""
    content = samples.comparison()
    content["base"]["loss"] = 2.6425
    text, _, figures = sections_of(samples.write(tmp_path / "toy", "comparison.json", content))
    assert (
        "The best control is “base, untrained”, 2.6425; by each method's own 95 % interval clearly better than it: no"
        in text
    )
    assert "lesa, the lowest method, is not clearly better than “base, untrained”." in text
    assert "Not clearly better than the untrained base: lesa and llama-pro." in text
    assert "base, untrained (control) 2.6425 +0.0015 ± 0.0081, not told apart – – 8" in text
    table = figures["final-loss"].table
    assert table is not None
    assert table.rows[1] == ("base, untrained", "2.6425", "–", "–")
    assert [panel.title for panel in figures["final-loss"].panels][1] == "against “base, untrained”"
    content["base"]["loss"] = 2.6405
    text, _, _ = sections_of(samples.write(tmp_path / "low", "comparison.json", content))
    assert "“base, untrained” has the lowest held-out loss at the end, in nats a token: 2.6405, no training." in text
    content["base"]["loss"] = None
    text, _, _ = sections_of(samples.write(tmp_path / "none", "comparison.json", content))
    assert "The untrained base's loss is not known: no control here trains the base." in text


def drawn(panel: Panel) -> Any:
    """The panel's axes, laid out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context({"font.size": 8.5, "ytick.labelsize": 8}):
        canvas = Canvas(figsize=(panel.width, panel.height), layout="tight")
        axes = canvas.add_subplot()
        panel.draw(axes)
        canvas.canvas.draw()
    return axes


def test_names_of_rows_do_not_overlap() -> None:
    content = samples.comparison(seeds=(0, 1))
    for number, one in enumerate(content["arms"]):
        one["name"] = f"aligned-lesa uniform predictor=ridge ridge={number}.0 no zero-init"
    parsed = Comparison.model_validate(content)
    arms = with_untrained(parsed)
    figures = [final_figure(parsed, arms), saving_figure(parsed, arms), reached_figure(parsed, arms)]
    for panel in [panel for figure in figures if figure for panel in figure.panels]:
        boxes = [label.get_window_extent() for label in drawn(panel).get_yticklabels()]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))
    assert figures[1] is not None
    lines = re.findall(r">([^<]+)</text>", svgs(figures[1])[0])
    assert any(line.startswith("% of what aligned-lesa") for line in lines)
    assert max(map(len, lines)) <= 46  # as wide as the panel


def test_an_arm_far_off_is_at_the_edge_of_what_shows_the_others() -> None:
    content = samples.comparison()
    for trial, loss in zip(content["arms"][1]["runs"], (2.65, 14.0, 13.0), strict=True):
        trial["final_loss"] = loss
    parsed = Comparison.model_validate(content)
    figure = final_figure(parsed, with_untrained(parsed))
    assert figure is not None
    runs, differences = figure.panels
    low, high = drawn(runs).get_xlim()
    assert 2.63 < low < 2.64
    assert 2.67 < high < 2.68
    assert drawn(differences).get_xlim()[1] < 0.03
    of_runs, of_differences = svgs(figure)
    assert ">9.883<" in of_runs
    assert "the mean is beyond" in of_runs
    assert ">+7.227<" in of_differences
    content["arms"] = content["arms"][:2]
    content["base"]["loss"] = None
    parsed = Comparison.model_validate(content)
    two = final_figure(parsed, with_untrained(parsed))
    assert two is not None
    assert drawn(two.panels[0]).get_xlim()[1] > 14  # of two, none is the one that is far off


def test_before_and_after_are_of_one_architecture_and_one_text() -> None:
    before = samples.bare_analysis(checkpoint="grown")
    same = Analysis.model_validate(before | {"checkpoint": "trained"})
    others = [before | change for change in ({"family": "mistral"}, {"hidden_size": 64}, {"new_layers": [2]})]
    others += [before | {"residual": before["residual"] | change} for change in ({"data": "other"}, {"tokens": 9})]
    analyses = [Analysis.model_validate(one) for one in (before, *others)]
    pairs = pair_up([("grown", analyses[0]), *((str(at), one) for at, one in enumerate(analyses[1:])), ("t", same)])
    assert (pairs[0].label, pairs[0].after_label) == ("grown", "t")
    assert [pair.after for pair in pairs[1:]] == [None] * len(others)


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


def test_nothing_ran_yet(tmp_path: Path) -> None:
    content = samples.comparison(reached=[])
    content["base"] = {"checkpoint": "base"}
    for one in content["arms"]:
        one["runs"] = [{"seed": 0, "status": "missing"}]
    written = write_report([samples.write(tmp_path / "toy", "comparison.json", content)], str(tmp_path / "out"))
    assert "No run is complete, so there is no ranking yet." in Page(tmp_path / "out/report.html").words()
    assert written.figures == ()


def test_the_best_of_a_task_is_the_lowest_where_lower_is_better(tmp_path: Path) -> None:
    content = samples.with_tasks(samples.comparison())
    _, _, figures = sections_of(samples.write(tmp_path / "now", "comparison.json", content))
    assert figures["tasks"].see == "lesa has the best mean in 3 of 3 tasks, told apart from all others in 2."
    perplexity, score, unknown = svgs(figures["tasks"])
    assert "perplexity (lower is better)" in perplexity
    assert "acc_norm (higher is better)" in score
    assert "perplexity (lower is better)" in unknown
    for metric in ({"metric": "wer", "higher_is_better": False}, {"metric": "nll_loss", "higher_is_better": None}):
        content["task_metrics"]["piqa"] = metric
        _, _, figures = sections_of(samples.write(tmp_path / "loss", "comparison.json", content))
        assert figures["tasks"].see == "lesa has the best mean in 2 of 3 tasks, told apart from all others in 2."
    del content["task_metrics"]  # as older files are: what a name does not say is taken for a score
    _, _, figures = sections_of(samples.write(tmp_path / "old", "comparison.json", content))
    assert figures["tasks"].see == "lesa has the best mean in 2 of 3 tasks, told apart from all others in 1."


def test_expansions_that_are_not_drawn_are_in_the_table() -> None:
    manifest = {"method": "lesa", "base": "b"}
    made = [
        Expansion(
            f"grown{n}", f"grown{n}", {**manifest, "fit": {"q_proj.weight": {"norm_ratio": n / 10}}}, trained=False
        )
        for n in range(10)
    ]
    figure = ratios_figure(made)
    assert figure is not None
    assert figure.table is not None
    assert figure.see.endswith("; 8 of 10 expansions are drawn, the table has them all.")
    assert figure.table.rows == (("q_proj", *(f"{n / 10:.3f}" for n in range(10))),)
    assert (few := ratios_figure(made[:8])) is not None
    assert "drawn" not in few.see


def test_what_fine_tuning_did_is_told(tmp_path: Path) -> None:
    content = samples.with_tasks(samples.comparison())
    text, _, figures = sections_of(samples.write(tmp_path / "plain", "comparison.json", content))
    assert "tuned" not in f"{text} {figures['tasks'].see}"
    content |= {"settings": {"finetune": {"data": "chats.jsonl"}}}
    content["base"]["tasks"] = {"piqa": 0.5}
    tuned = ((1.5, 1.5, None), (1.6, 1.61, 1.62), (1.7, 1.71, 1.72), (1.61, 1.6, 1.64))
    for losses, arm in zip(tuned, content["arms"], strict=True):
        for loss, trial in zip(losses, arm["runs"], strict=True):
            trial["tuned_loss"] = loss
    text, _, figures = sections_of(samples.write(tmp_path / "toy", "comparison.json", content))
    assert (  # lesa, which lacks a seed, is not ranked
        "After fine-tuning llama-pro has the lowest held-out loss on conversations: 1.6100 (SD 0.0100); not told apart "
        "from it: “random, zero output projections”."
    ) in text
    assert "every run is fine-tuned afterwards" in text
    assert re.search(r"llama-pro 2\.6610 .* 40 % 1\.6100 \(SD 0\.0100\)", text)
    assert figures["tasks"].see.endswith("; all were fine-tuned before, but for the untrained base.")


def test_published_results_of_the_same_setting(tmp_path: Path) -> None:
    content = samples.comparison()
    content["base"] |= {"layers": 16, "parameters": 1_235_814_400}
    for one in content["arms"]:
        one["layers"] = 16 if one["method"] is None else 24
        for trial in one["runs"]:
            trial["tasks"] = {"wikitext": 12.3 + trial["seed"], "piqa": 0.7}
    text, _, figures = sections_of(samples.write(tmp_path, "comparison.json", content))
    assert "filled marks are its own figures (wikitext word perplexity)" in text
    tuned, _, _ = sections_of(
        samples.write(tmp_path / "tuned", "comparison.json", {**content, "settings": {"finetune": {"data": "d"}}})
    )
    assert "it measured none of the papers' tasks" in tuned
    rows = [cell for _, _, cell in figures["published"].table.rows]
    assert "wikitext word perplexity: 12.19; mean of 7 tasks (%): 52.02" in rows
    drawn = svgs(figures["published"])[0], svgs(figures["tasks"])[0]
    assert all("var(--muted)" in svg for svg in drawn)


def test_published_figures_are_of_models_tuned_like_these() -> None:
    """OpT-DeUS's wikitext of LESA at 8B: 7.73, and 7.72 after tuning; of 1B none was tuned."""
    lines = {}
    for tuned, (layers, parameters) in itertools.product((False, True), ((32, 8_030_261_248), (16, 1_235_814_400))):
        content = samples.comparison(settings={"finetune": {"data": "d"} if tuned else None})
        content["base"] |= {"layers": layers, "parameters": parameters}
        for one in content["arms"]:
            one["layers"] = layers * 3 // 2
        parsed = Comparison.model_validate(content)
        lines[tuned, layers] = published_lines(parsed, views(parsed), "wikitext").get("lesa")
    assert lines == {(False, 32): 7.73, (True, 32): 7.72, (False, 16): 12.28, (True, 16): None}


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
    monkeypatch.setattr(build_module, "find_spec", lambda name: None)
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
    code, out, _ = run(capsys, monkeypatch, "report", good, "--out", tmp_path / "out", "--json")
    assert code == 0
    told = json.loads(out)
    there = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert there == {Path(name).name for name in told["figures"]} | {"mine.png"}
    assert "residual.png" not in there


def test_names_of_any_letters_are_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dollar signs are no formula; a letter that DejaVu Sans lacks is in a font beside it; one no font has is told."""
    content = samples.bare_analysis(layers=2, new_layers=(), checkpoint="a $_$ \U0001d7d5 \U0010fff0")
    content["types"] = {"mlp.a$_$b.weight": next(iter(content["types"].values()))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = write_report([samples.write(tmp_path / "toy", "analysis.json", content)], str(tmp_path / "out"))
    assert ">a$_$b<" in (tmp_path / "out/report.html").read_text()
    assert not caplog.records
    (told,) = [sentence for sentence in written.missing if "no font here has" in sentence]
    assert "\U0010fff0" in told
    assert "\U0001d7d5" not in told


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
