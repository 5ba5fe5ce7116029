"""Figures of a page: what is drawn of analyses, expansions and training runs, and how names and values stand."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesa_ray.report.page.build import write_report
from lesa_ray.report.page.compared import with_untrained
from lesa_ray.report.page.curves import reached_figure, saving_figure
from lesa_ray.report.page.figure import Panel, svgs
from lesa_ray.report.page.fit import ratios_figure
from lesa_ray.report.page.losses import final_figure
from lesa_ray.report.page.measures import orderliness
from lesa_ray.report.page.residual import pair_up
from lesa_ray.report.page.schema import Analysis, Comparison
from lesa_ray.report.page.sources import Expansion, Training
from lesa_ray.report.page.trained import training_figure
from tests.report import page_samples as samples
from tests.report.page_reading import sections_of

pytest.importorskip("matplotlib")


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
