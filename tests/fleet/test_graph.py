"""A fleet's graph: its stages, what they are, what is refused before anything runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, MachineError, UserError
from lesa_ray.config import validated
from lesa_ray.fleet import inputs
from lesa_ray.fleet.graph import build
from lesa_ray.fleet.settings import FleetConfig
from lesa_ray.fleet.stages import CONFIGS, Stage, merged
from lesa_ray.training import sources
from lesa_ray.training.sources import Source
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig
from tests import families
from tests.training import styles
from tests.training.blocks import make_blocks

TRAIN = {"steps": 2, "batch": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2"):
        families.make(name, root / name)
        styles.gpt2().save_pretrained(root / name)
    (root / "text.txt").write_text("The café opens at nine.\n")
    (root / "chat.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return root


def content(models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "f",
        "store": str(models / "store"),
        "families": [
            {"name": name, "checkpoint": str(models / name), "data": str(models / "text.txt")}
            for name in ("llama", "qwen2")
        ],
        "methods": ["lesa", "solar"],
        "factor": 1.5,
        "stages": {
            "tokenize": {"seq_len": 32}, "expand": {"lesa": {"epochs": 1}}, "pretrain": TRAIN,
            "finetune": {**TRAIN, "data": str(models / "chat.jsonl")}, "evaluate": None,
        },
        **changes,
    }  # fmt: skip


def made(models: Path, **changes: Any) -> dict[str, Stage]:
    stages = build(validated(FleetConfig, content(models, **changes), "file"), "file")
    return {stage.id: stage for stage in stages}


def digests(stages: dict[str, Stage]) -> dict[str, str]:
    assert all(stage.problem is None for stage in stages.values()), [stage.problem for stage in stages.values()]
    return {name: stage.identity.digest for name, stage in stages.items() if stage.identity}


def others(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def chain(label: str, first: str, kinds: Sequence[str] = tuple(CONFIGS)) -> set[str]:
    """The stages of a chain from one on."""
    names = list(kinds)
    return {f"{kind}/{label}" for kind in names[names.index(first) :]}


def test_every_family_goes_through_every_method_and_each_stage_after_those_it_needs(models: Path) -> None:
    stages = made(models)
    assert len(stages) == 2 * (1 + 2 * 4)
    seen: set[str] = set()
    for name, stage in stages.items():
        assert seen.issuperset(stage.needs)
        seen.add(name)
    assert stages["pretrain/llama-solar-x1.5"].needs == ("expand/llama-solar-x1.5", "tokenize/llama")
    places = {name: f"s3://b/{name}" for name in stages}
    expand = stages["expand/llama-lesa-x1.5"].settings("out", places)
    assert isinstance(expand, ExpandConfig)
    assert (expand.base, expand.factor, expand.lesa.epochs) == (str(models / "llama"), 1.5, 1)
    tuned = stages["finetune/llama-lesa-x1.5"].settings("out", places)
    assert isinstance(tuned, FinetuneConfig)
    assert tuned.checkpoint == "s3://b/pretrain/llama-lesa-x1.5"
    measured = stages["evaluate/llama-lesa-x1.5"].settings("out", places).model_dump()
    kinds = ("expand", "pretrain", "finetune")
    assert measured["checkpoints"] == (str(models / "llama"), *(f"s3://b/{kind}/llama-lesa-x1.5" for kind in kinds))
    assert measured["data"] == ("s3://b/tokenize/llama",)


def test_what_a_change_touches(models: Path) -> None:
    before = digests(made(models))
    stages = content(models)["stages"]

    def changed(**more: Any) -> set[str]:
        return others(before, digests(made(models, stages={**stages, **more})))

    labels = [f"{family}-{method}-x1.5" for family in ("llama", "qwen2") for method in ("lesa", "solar")]
    assert changed() == set()
    trained = changed(pretrain={**TRAIN, "learning_rate": 1e-3})
    assert trained == set().union(*(chain(label, "pretrain") for label in labels))
    assert changed(pretrain={**TRAIN, "workers": 2, "log_every": 1}) == set()  # these change nothing that is computed
    assert changed(expand={"lesa": {"epochs": 2}}) == set().union(
        *(chain(label, "expand") for label in labels if "lesa" in label)
    )
    assert changed(evaluate={"cpus_per_task": 1, "limit": 3}) == {f"evaluate/{label}" for label in labels}
    assert changed(evaluate={"cpus_per_task": 1, "gpus_per_task": 1, "batch_size": 3}) == set()
    assert changed(tokenize={"seq_len": 32, "bad_rows": "skip"}) == set()
    one = content(models)["families"]
    one[0]["stages"] = {"expand": {"seed": 1}}
    assert others(before, digests(made(models, families=one))) == {
        name for name in before if "/llama-" in name
    }  # and not its tokens
    assert others(before, digests(made(models, store="/elsewhere", name="g", at_once=1, retries=0))) == set()


def test_what_an_input_is_counts_and_not_where_it_lies(models: Path, tmp_path: Path) -> None:
    before = digests(made(models))
    copy = tmp_path / "copy"
    shutil.copytree(models, copy)
    shutil.copystat(models / "text.txt", copy / "text.txt")
    assert others(before, digests(made(copy))) == set()
    families.make("llama", copy / "llama", seed=1)
    assert others(before, digests(made(copy))) == {name for name in before if "/llama-" in name}
    told = copy / "llama" / "config.json"
    weights = digests(made(copy))
    told.write_text(told.read_text().replace("rms_norm_eps", "layer_norm_eps"))
    assert others(weights, digests(made(copy))) == {name for name in before if "/llama-" in name}
    (copy / "qwen2" / "tokenizer_config.json").write_text("{}")
    assert others(before, digests(made(copy))) >= {name for name in before if "qwen2" in name}


def test_every_method_and_factor_has_a_place_of_its_own(models: Path) -> None:
    found = [digests(made(models, factor=factor)) for factor in (1.5, 2.0)]
    expansions = [digest for one in found for name, digest in one.items() if name.startswith("expand/")]
    assert len(set(expansions)) == len(expansions) == 2 * 2 * 2


def test_inputs_of_a_stages_own_count_and_not_where_they_lie(models: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        families.make("llama", tmp_path / name, seed=seed)
        styles.STYLES["gpt2" if seed == 1 else "qwen"]().save_pretrained(tmp_path / name)
        for file in ("text.txt", "scores.json"):
            (tmp_path / name / file).write_text(str(seed))
            os.utime(tmp_path / name / file, (seed, seed))  # which is what tells files on a disk apart

    def digest(kind: str, **more: Any) -> str:
        stages = content(models)["stages"]
        stages[kind] = {**(stages[kind] or {}), **more}
        return digests(made(models, stages=stages))[f"{kind}/llama-lesa-x1.5"]

    for kind, setting, inside in (
        ("expand", "variants", ""), ("expand", "importance", "scores.json"), ("finetune", "tokenizer", ""),
        ("evaluate", "data", "text.txt"),
    ):  # fmt: skip
        more = {"position": "least-important"} if setting == "importance" else {}
        places = [str(tmp_path / name / inside) for name in "abc"]
        one, same, other = (
            digest(kind, **{setting: [place] if setting == "variants" else place, **more}) for place in places
        )
        assert one == same != other, setting


def test_settings_on_top_of_others_leave_what_they_do_not_name() -> None:
    common = {"lesa": {"epochs": 1, "ridge": 2}, "seed": 3, "variants": ["a"]}
    own = {"lesa": {"epochs": 4}, "variants": ["b"]}
    assert merged(common, own) == {"lesa": {"epochs": 4, "ridge": 2}, "seed": 3, "variants": ["b"]}


def test_token_blocks_count_by_their_content(tmp_path: Path) -> None:
    one, two = (make_blocks(str(tmp_path / name)) for name in ("one", "two"))
    assert inputs.data_identity((one,)) == inputs.data_identity((two,))
    assert inputs.data_identity((one,)) != inputs.data_identity((make_blocks(str(tmp_path / "three"), rows=8),))


def test_a_family_whose_checkpoint_is_not_there_stops_no_other(models: Path) -> None:
    families_ = content(models)["families"]
    families_[0]["checkpoint"] = str(models / "nothing")
    stages = made(models, families=families_)
    for name, stage in stages.items():
        assert (stage.problem is None) == ("qwen2" in name)
    assert "no such folder" in (stages["pretrain/llama-solar-x1.5"].problem or "")
    assert stages["pretrain/llama-solar-x1.5"].wrong


def test_a_store_that_does_not_answer_is_no_fault_of_the_file(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint_identity(name: str) -> Any:
        raise MachineError(f"{name}: no answer")

    monkeypatch.setattr("lesa_ray.fleet.stages.checkpoint_identity", checkpoint_identity)
    stage = made(models)["pretrain/llama-solar-x1.5"]
    assert "no answer" in (stage.problem or "")
    assert not stage.wrong


def test_without_expanding_the_base_itself_is_trained(models: Path) -> None:
    stages = made(models, stages={"tokenize": {}, "pretrain": TRAIN, "evaluate": None})
    assert len(stages) == 6
    config = stages["pretrain/llama"].settings("out", {"tokenize/llama": "blocks"})
    assert isinstance(config, TrainConfig)
    assert config.checkpoint == str(models / "llama")


def test_new_layers_of_a_base_that_names_none_are_told_of_before_anything_runs(models: Path, tmp_path: Path) -> None:
    def problems(base: Path, **train: Any) -> list[str | None]:
        families = [{"name": "llama", "checkpoint": str(base), "data": str(models / "text.txt")}]
        tuned = {**TRAIN, "data": str(models / "chat.jsonl"), **train}
        stages = {"tokenize": {}, "pretrain": {**TRAIN, **train}, "finetune": tuned}
        found = made(models, families=families, stages=stages)
        return [found[f"{kind}/llama"].problem for kind in ("tokenize", "pretrain", "finetune")]

    base = tmp_path / "base"
    shutil.copytree(models / "llama", base)
    (base / "expansion.json").unlink(missing_ok=True)
    no_new = f"checkpoint {base}: has no expansion.json, so which layers are new is not known"
    for train in ({}, {"train": ["norms", "new"]}, {"train": ["all"], "insert_over": 0.5}):
        none, *said = problems(base, **train)
        assert none is None
        assert all(one is not None and one.startswith(no_new) for one in said)
    assert problems(base, train=["all"]) == [None] * 3
    (base / "expansion.json").write_text("{}")
    assert problems(base) == [None] * 3
    deeper = made(models, stages={"tokenize": {}, "expand": None, "pretrain": TRAIN})
    assert all(stage.problem is None for stage in deeper.values())


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["stages"]["pretrain"].update(learning_rat=1), "stages.pretrain: learning_rat: Extra inputs"),
        (lambda c: c["stages"]["pretrain"].update(batch=0), "stages.pretrain: batch: Input should be greater"),
        (lambda c: c["stages"]["expand"].update(out="x"), "stages.expand.out: is given by the fleet itself"),
        (lambda c: c["stages"]["evaluate"].update(checkpoints=["x"]), "stages.evaluate.checkpoints: is given by"),
        (lambda c: c["stages"]["finetune"].pop("data"), "stages.finetune.data: missing"),
        (lambda c: c["stages"].update(exand={}), "stages.exand"),
        (lambda c: c["families"][0].update(name="../up"), "families.name: name '../up'"),
        (lambda c: c.update(name="a/b"), "name: name 'a/b'"),
        (lambda c: c["families"][1].update(name="llama"), "family llama: is there twice"),
        (lambda c: c.update(factors=[1.5, 2]), "give factor or factors, not both"),
        (lambda c: c["stages"].pop("tokenize"), "pretrain needs tokenize"),
        (lambda c: c["families"][0].pop("data"), "family llama: data is missing"),
        (lambda c: c["families"][0].update(stages={"evaluat": {}}), "stages.evaluat"),
        (lambda c: c.update(resources={"expand": {"gpu": 1}}), "resources.expand.gpu"),
        (lambda c: c.update(methods=["lesa", "magic"]), "stages.expand: --method magic: unknown; use one of lesa"),
        (lambda c: c.update(factor=1.0), "file: factors: Input should be greater than 1"),
        (lambda c: c.update(factor=float("inf")), "file: factors: Input should be a finite number"),
        (lambda c: c["stages"]["evaluate"].update(data=5), "stages.evaluate: data: Input should be"),
        (lambda c: c["stages"]["expand"].update(variants=[5]), "stages.expand: variants: Input should be"),
        (lambda c: c["stages"]["expand"].update(importance=5), "stages.expand: importance: Input should be"),
        (lambda c: c["stages"]["tokenize"].update(dataset_config=[1]), "stages.tokenize: dataset_config: Input should"),
        (lambda c: c["stages"]["finetune"].update(dataset_split={}), "stages.finetune: dataset_split: Input should be"),
        (lambda c: c["stages"]["finetune"].update(data=None), "stages.finetune: data: Input should be"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_before_anything_runs(change: Change, says: str, models: Path) -> None:
    wrong = content(models)
    wrong["stages"] = {name: dict(value or {}) for name, value in wrong["stages"].items()}
    change(wrong)
    with pytest.raises(UserError) as error:
        build(validated(FleetConfig, wrong, "file"), "file")
    assert says in str(error.value)
    assert str(error.value).startswith("file: ")


def test_a_stage_reads_the_commit_that_identifies_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub may have a newer one when the stage begins."""
    commits = {"org/talk": "c0ffee", "org/text": "1abe1"}

    def find(names: Sequence[str], *_: object) -> list[Source]:
        return [Source(name, 0, commits[name], name, shards=3) for name in names]

    monkeypatch.setattr(sources, "find_sources", find)
    family = {"name": "llama", "checkpoint": str(models / "llama"), "data": ["org/text", "org/talk"]}
    stages = {"tokenize": {"seq_len": 32}, "finetune": {**TRAIN, "data": "org/talk"}, "evaluate": None}
    found = made(models, families=[family], stages=stages)
    given = {
        name: stage.settings("out", {"tokenize/llama": "t", "finetune/llama": "f"}) for name, stage in found.items()
    }
    assert given["tokenize/llama"].model_dump()["data"] == ("org/text@1abe1", "org/talk@c0ffee")
    assert given["finetune/llama"].model_dump()["data"] == "org/talk@c0ffee"
    assert given["evaluate/llama"].model_dump()["data"] == ("t",)


def test_only_what_is_known_to_be_of_the_hub_is_given_at_a_commit() -> None:
    found = [
        ["org/a", 0, "c1", 2], ["org/b", 0, "c2", 2], ["other/b", 0, "c3", 2], ["org/c", 0, "c4", 2],
        ["org/c", 0, "c5", 2], ["d", 5, "mark", 0],
    ]  # fmt: skip
    names = ("org/a", "org/a@main", "org/b", "other/b", "org/c@old", "org/c", "/data/a", "s3://bucket/a", "org/d")
    expected = ("org/a@c1", "org/a@c1", "org/b@c2", "other/b@c3", *names[4:])
    assert inputs.pinned(names, found) == expected
