"""A comparison's graph on a tiny base, what a change touches, and the files that are shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lesa_ray import ExpandConfig, UserError
from lesa_ray.comparison.collect import Collector
from lesa_ray.comparison.graph import build
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.comparison.study_settings import StudyConfig
from lesa_ray.config import load_settings, validated
from lesa_ray.store.catalog import Store
from lesa_ray.training.tokens import open_blocks
from lesa_ray.training.train_settings import TrainConfig
from pipelines import study
from tests import families
from tests.comparison.planning import digests, made, planned
from tests.training import styles
from tests.training.blocks import make_blocks

PIPELINES = Path(__file__).parents[2] / "pipelines"
CONTROLS = ("random, zero output projections", "copy")
STUDIES = [PIPELINES / "compare.yaml", *sorted((PIPELINES / "studies").glob("*.yaml"))]
SEVERAL_BASES = sorted(PIPELINES.glob("study_*.yaml"))
HUB = {"meta-llama/Meta-Llama-3-8B": "llama", "Qwen/Qwen2.5-7B": "qwen2", "mistralai/Mistral-7B-v0.3": "mistral"}


def test_every_arm_goes_through_its_stages_with_every_seed(given: Path) -> None:
    comparison = made(given)
    arms, stages = planned(comparison), {stage.id: stage for stage in comparison.stages}
    assert list(arms)[:2] == ["lesa", "avg-deus"]
    assert {"base, same tokens", "base, same compute"} < set(arms)
    assert [run.expand for run in arms["lesa"].runs] == ["expand/c-lesa-s0", "expand/c-lesa-s1"]
    assert {run.expand for run in arms["avg-deus"].runs} == {"expand/c-avg-deus"}  # it draws no random numbers
    assert [s.given["seed"] for s in comparison.stages if s.kind == "expand"].count(1) == 2  # LESA's and the control's
    places = {name: f"s3://b/{name}" for name in stages}
    for seed, run in enumerate(arms["lesa"].runs):
        assert run.expand is not None
        expand = stages[run.expand].settings("out", places)
        assert isinstance(expand, ExpandConfig)
        assert (expand.method, expand.seed, expand.factor, expand.lesa.epochs) == ("lesa", seed, 1.4, 1)
        train = stages[run.pretrain].settings("out", places)
        assert isinstance(train, TrainConfig)
        assert (train.checkpoint, train.seed, train.tokens) == (places[run.expand], seed, 1024)  # whole steps
        assert train.eval_every == 1  # a twentieth of eight steps
    base = stages[arms["base, same tokens"].runs[0].pretrain].settings("out", places)
    assert isinstance(base, TrainConfig)
    assert (base.checkpoint, base.train) == (str(given / "base"), ("all",))
    facts = arms["lesa"].facts
    assert (facts.layers, comparison.base.layers) == (7, 5)
    assert facts.trained_parameters / facts.parameters == pytest.approx(2 / 7, abs=0.06)
    assert comparison.base.trained_parameters == comparison.base.parameters


def test_the_control_of_equal_compute_takes_the_reference_s_flops(given: Path) -> None:
    for reference in ("lesa", "solar"):
        comparison = made(given, tokens=100_000, arms=[{"method": ["lesa", "solar"]}], reference=reference)
        arms = planned(comparison)
        control, other = arms["base, same compute"], arms[reference]
        assert control.tokens * control.facts.flops_per_token == pytest.approx(
            other.tokens * other.facts.flops_per_token,
            rel=1e-3,  # whole steps
        )
        assert control.settings == {"pretrain": {"train": "all"}, "compute_of": reference}
    assert control.tokens > 120_000  # SOLAR trains seven layers where the base has five


def test_controls_of_equal_tokens_and_compute_may_be_the_same_runs_and_that_is_said(given: Path) -> None:
    """One step of a deeper model takes more than one step of the base, but less than one and a half."""
    comparison = made(given, tokens=128, controls={"plain_copies": False})
    arms = planned(comparison)
    control, other = arms["base, same compute"], arms["base, same tokens"]
    assert control.tokens == other.tokens == 128
    assert len({digests(comparison)[arm.runs[0].pretrain] for arm in (control, other)}) == 1
    equal = 128 * arms["lesa"].facts.flops_per_token / control.facts.flops_per_token
    assert comparison.remarks == (
        "“base, same tokens” and “base, same compute” are the same runs here: 128 tokens of lesa take the FLOPs of "
        f"{equal:,.0f} of the base, which is as many whole steps",
    )
    assert made(given, tokens=100_000).remarks == ()


def test_arms_may_have_widths_of_their_own_and_each_seed_draws_its_own(given: Path) -> None:
    comparison = made(
        given, arms=[{"method": "llama-pro", "new_width": 2.0}, {"method": "avg-deus"}], reference="avg-deus"
    )  # fmt: skip
    wide, plain = planned(comparison)["llama-pro new-width=2.0"], planned(comparison)["avg-deus"]
    assert wide.facts.parameters > plain.facts.parameters
    assert len({run.expand for run in wide.runs}) == 2
    assert len({run.expand for run in plain.runs}) == 1


def test_another_first_seed_leaves_what_draws_no_random_numbers(given: Path) -> None:
    before, after = digests(made(given, seeds=[1, 2])), digests(made(given, seeds=[0, 1, 2]))
    assert {name: after[name] for name in before} == before
    assert all(name.endswith("-s0") for name in after.keys() - before.keys())


def test_a_long_name_leaves_room_for_the_seed(given: Path) -> None:
    long = "aligned and retuned and spread evenly over all of the layers"
    comparison = made(given, name="c" * 60, arms=[{"method": "lesa", "label": long}], seeds=[1234567890])
    assert max(len(stage.label) for stage in comparison.stages) == 98


def test_what_arms_have_in_common_does_not_hang_on_the_first(given: Path) -> None:
    arms = [{"method": "base", "pretrain": {"learning_rate": 1e-5}}, {"method": "avg-deus"}]
    places = []
    for order in (arms, arms[::-1]):
        comparison = made(given, arms=order)
        places.append(Collector(comparison, Store(str(given / "store"), 60.0)).storage.url)
    assert places[0] == places[1]


def test_layers_come_in_gradually_where_some_are_new(given: Path) -> None:
    at_once = {"insert_over": 0, "insert_order": "together"}
    comparison = made(
        given, arms=[{"method": "lesa"}, {"method": "solar", "pretrain": at_once}], reference="lesa", tokens=20_480,
        pretrain={"batch": 4, "insert_over": 0.5, "insert_order": "top"},
    )  # fmt: skip
    arms, places = planned(comparison), dict.fromkeys([stage.id for stage in comparison.stages], "x")
    stages = {stage.id: stage.settings("out", places) for stage in comparison.stages if stage.kind == "pretrain"}
    told = {name: (arm.inserted_tokens, stages[arm.runs[0].pretrain]) for name, arm in arms.items()}
    assert {name for name, (tokens, _) in told.items() if tokens} == {"lesa", *CONTROLS}
    for tokens, settings in told.values():
        assert isinstance(settings, TrainConfig)
        assert (settings.insert_over, settings.insert_order) == ((0.5, "top") if tokens else (0, "together"))
    assert arms["lesa"].inserted_tokens == arms["lesa"].tokens / 2
    assert comparison.remarks[0] == (
        f"lesa: its new layers come in over the first {arms['lesa'].tokens // 2:,} tokens; until then its loss is that "
        "of the model with gates, at first the base's own"
    )
    with pytest.raises(UserError, match="insert_order top: layers are in at once; give insert_over too"):
        made(given, pretrain={"insert_order": "top"})


def test_what_a_change_touches(given: Path) -> None:
    before = digests(made(given))

    def changed(**changes: Any) -> set[str]:
        after = digests(made(given, **changes))
        assert after.keys() == before.keys()
        return {name for name in before if before[name] != after[name]}

    more = digests(made(given, arms=[{"method": ["lesa", "avg-deus", "solar"]}]))
    new = {"expand/c-solar", "pretrain/c-solar-s0", "pretrain/c-solar-s1"}
    assert {name: more[name] for name in before} == before
    assert more.keys() - before.keys() == new
    assert changed(eval_every=2, losses=[3.0], at_once=1) == set()
    assert changed(expand={"factor": 1.4, "lesa": {"epochs": 2}}) == {
        *(f"{kind}/c-lesa-s{seed}" for kind in ("expand", "pretrain") for seed in (0, 1)),
    }
    assert changed(tokens=2000) == {name for name in before if name.startswith("pretrain/")}
    one, two = (digests(made(given, expand={"layers": layers, "lesa": {"epochs": 1}})) for layers in (8, 9))
    assert {name for name in one if one[name] != two[name]} == {
        name for name in before if "base-same-tokens" not in name
    }


def test_text_is_tokenized_first_and_runs_end_with_tuning_and_tasks(given: Path) -> None:
    comparison = made(
        given, blocks=None, data=str(given / "text.txt"), tokenize={"seq_len": 16}, tasks="piqa",
        finetune={"data": str(given / "chat.jsonl"), "seq_len": 16}, arms={"method": "llama-pro"}, seeds=[3],
    )  # fmt: skip
    stages = {stage.id: stage for stage in comparison.stages}
    assert comparison.tokenize == "tokenize/c-data"
    assert comparison.seq_len == 16
    arms = planned(comparison)
    (run,) = arms["llama-pro"].runs
    assert run.stages == tuple(
        f"{kind}/c-llama-pro{seed}"
        for kind, seed in (("expand", ""), ("pretrain", "-s3"), ("finetune", "-s3"), ("evaluate", "-s3"))
    )
    assert stages[run.pretrain].needs == (run.expand, comparison.tokenize)
    assert run.evaluate is not None
    assert stages[run.evaluate].needs == (run.finetune,)
    assert comparison.base_evaluate == "evaluate/c-base"
    base = arms["base, same tokens"].runs[0]
    assert base.finetune is not None
    tuned = stages[base.finetune].settings("out", dict.fromkeys(stages, "x"))
    assert isinstance(tuned, TrainConfig)
    assert tuned.train == ("all",)


def test_a_control_that_the_base_cannot_have_is_left_out_and_that_is_said(given: Path, tmp_path: Path) -> None:
    families.make("llama", tmp_path / "base", layers=1)
    comparison = made(given, base=str(tmp_path / "base"), arms={"method": "llama-pro"}, expand={"factor": 2})
    assert list(planned(comparison)) == ["llama-pro", "base, same tokens", "base, same compute"]
    assert [note.split(":")[0] for note in comparison.notes] == [
        f"control {name}" for name in CONTROLS
    ]  # fmt: skip
    assert all("needs two" in note or "needs at least 2 layers" in note for note in comparison.notes)
    with pytest.raises(UserError):
        made(given, base=str(tmp_path / "base"), arms={"method": "avg-deus"}, expand={"factor": 2})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"method": ["lesa", "lasa"]}}, "file: arm lasa: --method lasa: unknown"),
        ({"arms": {"position": "2-9"}, "expand": {}}, "file: arm lesa 2-9: --position 2-9: gap 9 is out of range"),
        ({"arms": {"factor": 0.5}}, "file: arm lesa factor=0.5: --factor 0.5: must be greater than 1"),
        ({"arms": {"lesa": {"epoch": 1}}}, "file: arm lesa epoch=1: lesa.epoch: Extra inputs"),
        ({"arms": {"method": "solar", "lesa": {"rank": 4}}}, "file: arm solar rank=4: "),
        ({"arms": {"train": "nothing"}}, "file: arm lesa train=nothing: train nothing: matches no parameter"),
        ({"pretrain": {"learning_rat": 1}}, "file: arm lesa: pretrain: learning_rat: Extra inputs"),
        ({"pretrain": {"data": "x"}}, "file: pretrain.data: is given by the comparison itself"),
        ({"tokens": 0}, "file: tokens: Input should be greater"),
        ({"finetune": {}}, "file: finetune.data: missing"),
        ({"base": "/nowhere"}, "no such folder"),
        ({"blocks": "/nowhere"}, "holds no finished token blocks"),
        ({"blocks": None, "data": "/nowhere", "tokenize": {"seq_len": 32}}, "/nowhere"),
        ({"blocks": None, "data": "text.txt", "tokenize": {"seq_len": 128}}, "was made for 64 tokens"),
    ],
)
def test_wrong_settings_of_any_arm_are_found_before_anything_runs(
    changes: dict[str, Any], says: str, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given)
    with pytest.raises(UserError) as error:
        made(given, **changes)
    assert says in str(error.value)
    assert not (given / "store").exists()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases as deep as those of the shipped files, token blocks and text in place of theirs."""
    root = tmp_path_factory.mktemp("stand-ins")
    for layers in (8, 16, 32):
        families.make("mistral", root / f"base-{layers}", layers=layers, max_position_embeddings=2048)
        styles.qwen(styles.CHATML).save_pretrained(root / f"base-{layers}")
    make_blocks(str(root / "blocks"), seq_len=256, rows=8)
    (root / "text.txt").write_text("The café opens at nine.\n")
    (root / "chat.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return root


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_comparison_fits_together(path: Path, stand_ins: Path) -> None:
    shipped = yaml.safe_load(path.read_text())
    layers = {"meta-llama/Llama-3.2-1B": 16, "demo/base": 8}.get(shipped["base"], 32)
    base = str(stand_ins / f"base-{layers}")
    here = {**shipped, "base": base, "store": str(stand_ins / "store")}
    here |= {"blocks": str(stand_ins / "blocks")} if "blocks" in shipped else {"data": str(stand_ins / "text.txt")}
    here["arms"] = [{**arm, **({"variants": [[base]]} if "variants" in arm else {})} for arm in shipped["arms"]]
    if "finetune" in shipped:
        here["finetune"] = {**shipped["finetune"], "data": str(stand_ins / "chat.jsonl"), "tokenizer": base}
    comparison = build(validated(ComparisonConfig, here, path.name), path.name)
    assert comparison.notes == ()
    arms = planned(comparison)
    controls = [arm for arm in comparison.arms if arm.arm.control]
    assert len(controls) >= 3
    assert len(arms) >= len(shipped["arms"]) + 3
    assert all(arm.facts.layers == layers * 3 // 2 for arm in comparison.arms if arm.arm.method is not None)
    chains = sum(len(run.stages) for arm in comparison.arms for run in arm.runs)
    assert len(comparison.stages) <= chains + 2
    for stage in comparison.stages:  # what each command will be given
        stage.settings("out", dict.fromkeys(stage.needs, "s3://bucket/x"))


@pytest.mark.parametrize("path", SEVERAL_BASES, ids=lambda path: path.stem)
def test_every_shipped_study_fits_together(path: Path, stand_ins: Path, tmp_path: Path) -> None:
    """Every arm on every base: those that are pre-trained first as they will be, of random weights; the hub's in
    miniature."""
    config = load_settings(StudyConfig, str(path)).model_copy(update={"out": str(tmp_path), "store": None})
    for base in config.bases:
        blocks = None
        if base.architecture is not None:
            folder = make_blocks(str(tmp_path / base.name), seq_len=config.tokenize["seq_len"], rows=8)
            blocks = replace(open_blocks(folder), vocab_size=config.vocab_size)
        else:
            family = HUB[base.checkpoint or ""]
            families.make(family, tmp_path / base.name, layers=8, max_position_embeddings=2048)
            styles.qwen(styles.CHATML).save_pretrained(tmp_path / base.name)
            given = {"checkpoint": str(tmp_path / base.name), "data": (str(stand_ins / "text.txt"),)}
            base = base.model_copy(update=given)
        comparison = study.try_arms(config, base, blocks)
        assert comparison.notes == ()
        assert {"lesa", "mean-aligned zero-init", "aligned-lesa ridge", "copy"} < planned(comparison).keys()
        for arm in comparison.arms:
            assert arm.arm.method is None or arm.facts.layers == round(1.5 * comparison.base.layers)
