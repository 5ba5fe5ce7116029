"""A study over several bases: what it takes, what it concludes, and that it runs from nothing to results.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from lesa_ray import UserError
from lesa_ray.comparison.study_settings import BASE_SEED, StudyBase, StudyConfig
from lesa_ray.comparison.verdict import reading, verdict
from lesa_ray.config import load_settings
from pipelines import corpus, prose, study
from tests import families
from tests.training import styles
from tests.training.blocks import make_blocks

ARMS: dict[str, Any] = {"arms": [{"method": "llama-pro"}], "tokens": 256}
MADE: dict[str, Any] = {"name": "a", "architecture": {"model_type": "llama"}, "data": "d", "tokenizer": "t"}
NO_CONTROLS = dict.fromkeys(("base_same_tokens", "base_same_compute", "random_zero_output", "plain_copies"), False)
BASES: dict[str, Any] = {"bases": [{"name": "a", "checkpoint": "c", "data": "d"}]}


def comparison(losses: dict[str, list[float]], start: float | None = 5.0) -> dict[str, Any]:
    """The parts of a `comparison.json` that count; names in capitals are controls."""
    return {
        "base": {"loss": start},
        "machine": {"device": "CPU"},
        "arms": [
            {
                "name": name,
                "control": name.isupper(),
                "runs": [{"seed": s, "final_loss": v, "loss_before": 5.5} for s, v in enumerate(values)],
            }
            for name, values in losses.items()
        ],
    }


def test_an_arm_is_better_only_if_it_is_so_on_every_base() -> None:
    one = comparison({"x": [1.0, 1.1, 1.2], "y": [1.1, 1.21, 1.3], "z": [0.7, 0.9, 0.7], "COPY": [1.5, 1.6, 1.7]})
    two = comparison({"x": [2.0, 2.1, 2.2], "y": [2.1, 2.2, 2.31], "z": [2.6, 2.4, 2.8], "COPY": [2.5, 2.6, 2.7]})
    found = verdict({"one": one, "two": two})
    assert (found.yardstick, found.best, found.incomplete) == ("COPY", "x", ())
    assert found.alike == ("z",)  # better on the first, worse on the second
    x = found.arms[0]
    assert x.difference == pytest.approx(-0.5)
    assert x.bases["two"].before == pytest.approx(0.5)
    y = next(arm for arm in found.arms if arm.name == "y").bases["one"]
    interval = ttest_rel([1.1, 1.21, 1.3], [1.5, 1.6, 1.7]).confidence_interval(0.95)
    assert y.half == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert y.difference == pytest.approx((interval.high + interval.low) / 2)
    assert [arm.name for arm in found.arms][-1] == "base, untrained"
    told = " ".join(reading(found))
    assert "x ends lowest of the methods, -0.5000 nats from the best control, COPY, in the mean over 2 bases" in told
    assert "not told apart from it on every base, by intervals for all pairs: z." in told
    assert "Controls that it does not clearly beat on every base, each by its own interval: none." in told
    assert "On one it does not clearly beat: none. Methods that clearly beat every control there: x; z; y." in told
    assert "On two it does not clearly beat: none. Methods that clearly beat every control there: x; y." in told
    assert "Methods that clearly beat every control on every base: x; y." in told
    assert "Methods that do not clearly beat the untrained base on every base: none." in told


def test_what_is_not_there_on_every_base_is_told_and_does_not_count() -> None:
    one = comparison({"x": [1.0, 1.1], "y": [0.1, 0.2], "COPY": [1.5, 1.6]})
    two = comparison({"x": [2.0, 2.1], "y": [], "COPY": [1.9, 2.0]})
    found = verdict({"one": one, "two": two})
    assert (found.best, found.incomplete, found.alike) == ("x", ("y",), ("COPY",))
    assert reading(found)[-1] == "Not ranked, without a result with every seed on every base: y."


def test_an_arm_that_lacks_a_seed_is_neither_the_best_nor_the_yardstick() -> None:
    """Both that lost seeds have the lowest mean of their kind."""
    losses = {"x": [1.0], "y": [1.0, 1.1, 1.3], "COPY": [1.4], "BASE": [1.4, 1.6, 1.7]}
    found = verdict({"one": comparison(losses)})
    assert [arm.name for arm in found.arms] == ["y", "BASE", "base, untrained"]
    assert (found.yardstick, found.best, found.incomplete) == ("BASE", "y", ("x", "COPY"))
    told = reading(found)
    assert not any("one seed" in line for line in told)
    assert told[-1] == "Not ranked, without a result with every seed on every base: x; COPY."
    with pytest.raises(UserError, match="no control has results with every seed on every base"):
        verdict({"one": comparison({"x": [1.0]}, start=None)})


def test_the_yardstick_is_the_best_control_over_all_bases() -> None:
    """One control is the best on the first base, the other in the mean; all methods are above both."""
    one = comparison({"x": [2.9, 3.0, 3.1], "COPY": [1.0, 1.1, 1.2], "BASE": [1.5, 1.6, 1.7]}, start=1.65)
    two = comparison({"x": [3.9, 4.0, 4.1], "COPY": [3.0, 3.1, 3.2], "BASE": [2.0, 2.1, 2.2]}, start=2.3)
    found = verdict({"one": one, "two": two})
    assert [arm.name for arm in found.arms] == ["BASE", "base, untrained", "COPY", "x"]
    assert (found.yardstick, found.best) == ("BASE", "x")
    copy = found.arms[2]
    assert copy.unbeaten == ("BASE", "base, untrained")
    assert copy.bases["one"].unbeaten == ()
    assert not any(arm.name in arm.unbeaten for arm in found.arms)


def test_a_run_without_a_measurement_at_its_beginning_is_left_out_of_the_mean_before() -> None:
    one = comparison({"x": [1.0, 1.1, 1.2], "COPY": [1.5, 1.6, 1.7]})
    runs = one["arms"][0]["runs"]
    runs[0]["loss_before"], runs[1]["loss_before"] = None, 5.9
    assert verdict({"one": one}).arms[0].bases["one"].before == pytest.approx(0.7)
    for run in runs:
        run["loss_before"] = None
    assert verdict({"one": one}).arms[0].bases["one"].before is None


def test_controls_alone_are_told_as_such() -> None:
    found = verdict({"one": comparison({"x": [], "COPY": [1.5, 1.6]})})
    assert (found.best, found.alike) == (None, ())
    assert reading(found) == ["No method has results with every seed on every base yet."]


def test_methods_that_are_not_told_apart_are_methods() -> None:
    """The control that is as near stands in the next line."""
    told = reading(verdict({"one": comparison({"x": [1.0, 1.4], "y": [1.1, 1.3], "COPY": [1.2, 1.3]})}))
    assert told[0].endswith("from the best control, COPY, in the mean over 1 base.")
    assert told[1].startswith("Methods not told apart from it on every base, by intervals for all pairs: y.")
    assert told[2].startswith("Controls that it does not clearly beat on every base, each by its own interval: COPY")


def test_one_seed_on_one_base_is_not_one_seed_on_all() -> None:
    one, two = comparison({"x": [1.0], "COPY": [2.0]}), comparison({"x": [1.0, 1.1], "COPY": [2.0, 2.1]})
    said = "There is one seed: no spread is known, nothing is told apart, and the order is not a finding."
    assert said in reading(verdict({"one": one}))
    assert said not in reading(verdict({"one": one, "two": two}))


def test_what_is_told_apart_from_the_best_allows_for_its_having_been_picked() -> None:
    """The nearest arm is ±13 standard errors away: clear of two arms, not of six."""
    near = {"x": [1.0, 1.1, 1.2], "y": [1.1, 1.2, 1.32]}
    more = {name: [2.0, 2.1, 2.2] for name in ("z", "COPY", "BASE")}
    assert verdict({"one": comparison({**near, "COPY": [2.0, 2.1, 2.2]})}).alike == ()
    assert verdict({"one": comparison({**near, **more})}).alike == ("y",)


def test_a_method_that_does_not_beat_the_base_as_it_is_has_gained_nothing() -> None:
    """Both are clearly better than the trained control on both bases; on the second, neither than doing nothing."""
    one = comparison({"x": [1.0, 1.1, 1.2], "y": [1.2, 1.3, 1.4], "COPY": [1.9, 2.0, 2.1]}, start=1.6)
    two = comparison({"x": [3.0, 3.1, 3.2], "y": [3.1, 3.2, 3.3], "COPY": [3.9, 4.0, 4.1]}, start=3.2)
    found = verdict({"one": one, "two": two})
    assert (found.yardstick, found.best) == ("base, untrained", "x")
    x, _, base, _ = found.arms
    assert (x.control, base.control, base.difference, base.bases["one"].half) == (False, True, 0.0, 0.0)
    assert (base.bases["one"].before, x.bases["one"].before) == pytest.approx((0.0, 3.9))
    interval = ttest_1samp([3.0, 3.1, 3.2], 3.2).confidence_interval(0.95)
    assert x.bases["two"].difference == pytest.approx((interval.high + interval.low) / 2 - 3.2)
    assert x.bases["two"].half == pytest.approx((interval.high - interval.low) / 2, rel=1e-3)
    assert (x.unbeaten, x.bases["one"].unbeaten, x.bases["two"].unbeaten) == (
        ("base, untrained",), (), ("base, untrained",)
    )  # fmt: skip
    told = reading(found)
    assert "Controls that it does not clearly beat on every base, each by its own interval: base, untrained." in told
    assert "On one it does not clearly beat: none. Methods that clearly beat every control there: x; y." in told
    assert (
        "On two it does not clearly beat: base, untrained. Methods that clearly beat every control there: none." in told
    )
    assert "Methods that clearly beat every control on every base: none." in told
    assert "Methods that do not clearly beat the untrained base on every base: x; y." in told
    assert "Methods that clearly beat every control on every base: none." in reading(verdict({"two": two, "one": one}))
    shown = study.table({"verdict": asdict(found), "comparisons": {"one": "", "two": ""}})
    assert list(shown.columns[0].cells) == ["x", "y", "base, untrained", "COPY"]
    two["base"]["loss"] = None
    found = verdict({"one": one, "two": two})
    assert (found.yardstick, found.incomplete) == ("COPY", ("base, untrained",))
    assert any("The untrained base's loss is not known on every base" in line for line in reading(found))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"compare": {**ARMS, "store": "s"}}, "compare.store: the study gives it"),
        ({"compare": {"arms": []}}, "compare.tokens: Field required"),
        ({"bases": [{"name": "a", "data": "d"}]}, "a: give checkpoint or architecture"),
        ({"bases": [{"name": "a", "checkpoint": "c"}]}, "a: give corpus or data"),
        ({"bases": [{"name": "a", "checkpoint": "c", "corpus": "code"}]}, "corpus and train are for a base"),
        ({"bases": [{"name": "a", "architecture": {}, "data": "d"}]}, "a: tokenizer: a model that is"),
        ({"bases": [{**MADE, "data": (), "corpus": "code"}]}, "a: tokenizer: a corpus has one of its own"),
        ({"train": {"steps": 3}}, "train: is for bases that are pre-trained here, and none is"),
        ({"vocab_size": 999}, "vocab_size: is for bases that are pre-trained here, and none is"),
        ({"bases": [MADE], "train": {"seed": 2}}, "train.seed 2: is among compare.seeds"),
        ({"bases": [*BASES["bases"], *BASES["bases"]]}, "bases: a is there twice"),
        ({"train": {"out": "o"}}, "train.out: the study gives it"),
        ({"compare": {**ARMS, "controls": NO_CONTROLS}}, "compare.controls: none is left"),
        ({"compare": {**ARMS, "pretrain": {"eval_rows": 0}}}, "compare: pretrain.eval_rows: 0 leaves nothing"),
        ({"name": "n" * 60, "bases": [{**BASES["bases"][0], "name": "b" * 60}]}, "compare.name: "),
    ],
)
def test_settings_that_make_no_study(given: dict[str, Any], says: str) -> None:
    settings = {"name": "s", "out": "o", **BASES, "compare": ARMS, **given}
    with pytest.raises(UserError, match=says):
        load_settings(StudyConfig, None, **settings)


def test_more_seeds_leave_the_bases_as_they_are() -> None:
    def seed(seeds: list[int]) -> Any:
        given = {"name": "s", "out": "o", "bases": [MADE], "compare": {**ARMS, "seeds": seeds}}
        config = load_settings(StudyConfig, None, **given)
        return config.seed_of(config.bases[0])

    assert seed([0, 1, 2]) == seed([0, 1, 2, 3]) == BASE_SEED


def test_a_corpus_of_prose_and_one_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "PACKAGES", ("yaml", "not_installed_at_all"))
    library = tmp_path / "library"
    library.mkdir()
    for number in range(corpus.FEWEST_FILES):
        (library / f"m{number}.py").write_text(f'"""{f"What number {number} is for. " * 30}"""\nx = {number}\n')
    settings = corpus.CorpusSettings(kinds=("prose",), vocab_size=300)
    made = corpus.build_corpus(str(tmp_path / "prose"), settings, str(library))
    texts = [path.read_text() for path in Path(made.text_folder).rglob("*.txt")]
    assert made.files == len(texts) >= corpus.FEWEST_FILES
    assert not any("x = " in text for text in texts)
    assert any(text.startswith("What number 7 is for.") for text in texts)
    settings = corpus.CorpusSettings(kinds=("packages",), vocab_size=300)
    made = corpus.build_corpus(str(tmp_path / "packages"), settings, str(library))
    names = {path.relative_to(made.text_folder).as_posix() for path in Path(made.text_folder).rglob("*.py")}
    assert "packages/yaml/__init__.py" in names
    assert not any(name.startswith("m") for name in names)
    with pytest.raises(ValueError, match="prose stands alone"):
        corpus.CorpusSettings(kinds=("code", "prose"))


def test_a_base_that_cannot_be_trained_stops_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.make("llama", tmp_path / "llama")
    make_blocks(str(tmp_path / "blocks"), seq_len=32)
    bases = [{"name": name, "checkpoint": str(tmp_path / "llama"), "data": str(tmp_path)} for name in ("lost", "there")]
    compare = {**ARMS, "expand": {"factor": 1.4}, "pretrain": {"batch": 4}}
    given = {"name": "s", "out": str(tmp_path / "out"), "bases": bases, "compare": compare}
    config = load_settings(StudyConfig, None, **given)
    ran = []

    def make_base(_: Any, base: StudyBase, blocks: Any) -> str:
        if base.name == "lost":
            raise UserError("step 7: the loss is nan")
        return str(tmp_path / "llama")

    def run_comparison(planned: Any, say: Any) -> Any:
        ran.append(planned.config.name)
        return comparison({"x": [1.0, 1.1], "COPY": [1.5, 1.6]}), []

    monkeypatch.setattr(study, "make_base", make_base)
    monkeypatch.setattr("lesa_ray.distributed.compare.run_comparison", run_comparison)
    monkeypatch.setattr(
        study, "comparison_of",
        lambda config, base, checkpoint, _: config.comparison(base, checkpoint, "s", str(tmp_path / "blocks")),
    )  # fmt: skip
    results = study.run_study(config)
    assert (ran, results["missing"]) == (["s-there"], ["lost: step 7: the loss is nan"])
    assert results["comparisons"].keys() == {"there"}
    with pytest.raises(UserError, match="lost: step 7: the loss is nan"):
        study.run_study(config.model_copy(update={"bases": config.bases[:1]}))


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_from_nothing_to_results(tmp_path: Path) -> None:
    """One base that is pre-trained here, one that is there; two arms, one of them a control."""
    families.make("llama", tmp_path / "llama", vocab_size=512)
    styles.STYLES["llama3"]().save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("".join(f"The café opens at nine, says line {i}.\n" for i in range(400)))
    text = {"data": str(tmp_path / "text.txt")}
    scratch = json.loads((tmp_path / "llama" / "config.json").read_text())
    training = {"batch": 2, "precision": "fp32", "cpus_per_worker": 1, "eval_rows": 4}
    off = dict.fromkeys(("base_same_compute", "random_zero_output", "plain_copies"), False)
    given = {
        "name": "tiny",
        "out": str(tmp_path / "out"),
        "bases": [
            {"name": "there", "checkpoint": str(tmp_path / "llama"), **text},
            {"name": "made", "architecture": scratch, "tokenizer": str(tmp_path / "llama"), **text},
        ],
        "tokenize": {"seq_len": 32, "holdout": 0.2},
        "train": {**training, "steps": 2},
        "compare": {"arms": [{"method": "llama-pro"}], "tokens": 128, "seeds": [0], "controls": off,
                    "expand": {"factor": 1.4}, "pretrain": training},
    }  # fmt: skip
    config = load_settings(StudyConfig, None, **given)
    results = study.run_study(config)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {arm["name"] for arm in results["verdict"]["arms"]} == {
        "llama-pro", "base, same tokens", "base, untrained"
    }  # fmt: skip
    assert all(arm["bases"].keys() == {"there", "made"} for arm in results["verdict"]["arms"])
    assert study.run_study(config) == results  # at once
