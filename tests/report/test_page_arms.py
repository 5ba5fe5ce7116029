"""What a page says and draws of the arms of a comparison: which is best, what is chance, what equal loss costs."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path

import pytest

from lesa_ray.report.page.build import write_report
from lesa_ray.report.page.compared import views
from lesa_ray.report.page.figure import Figure, svgs
from lesa_ray.report.page.schema import Comparison
from lesa_ray.report.page.sources import Training
from lesa_ray.report.page.tasks import published_lines
from lesa_ray.report.page.trained import training_figure
from tests.report import page_samples as samples
from tests.report.page_reading import Page, sections_of

pytest.importorskip("matplotlib")


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
