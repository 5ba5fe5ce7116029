"""Arms, grids, names and controls: settings alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lesa_ray import UserError
from lesa_ray.comparison.arms import Arm, arms_of, expand_settings
from lesa_ray.comparison.settings import ComparisonConfig
from lesa_ray.config import validated

CONTROLS = ["base, same tokens", "base, same compute", "random, zero output projections", "copy"]


def config(**changes: Any) -> ComparisonConfig:
    content = {"name": "c", "store": "s", "base": "b", "blocks": "d", "tokens": 1000, "arms": {"method": "lesa"}}
    return validated(ComparisonConfig, {**content, **changes}, "file")


def arms(**changes: Any) -> list[Arm]:
    return arms_of(config(**changes), "file")[0]


def controls(**changes: Any) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(config(**changes), "file")[1]}


def test_lists_multiply_wherever_they_stand() -> None:
    entry = {
        "method": ["lesa", "llama-pro"],
        "position": ["top", "uniform"],
        "lesa": {"epochs": [5, 10], "svd": "gram"},
        "pretrain": {"betas": [[0.9, 0.95]]},
    }
    found = arms(arms=[entry, {"method": "solar"}])
    assert len(found) == 9
    assert len({arm.name for arm in found}) == 9
    assert found[0].expand == {"position": "top", "lesa": {"epochs": 5, "svd": "gram"}}
    assert found[3].expand == {"position": "uniform", "lesa": {"epochs": 10, "svd": "gram"}}
    assert all(arm.pretrain == {"betas": [0.9, 0.95]} for arm in found[:8])
    assert (found[8].name, found[8].expand, found[8].pretrain) == ("solar", {}, {})
    assert [arm.method for arm in found[:8]] == 4 * ["lesa"] + 4 * ["llama-pro"]


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({}, ["lesa"]),
        ({"method": ["lesa", "copy"]}, ["lesa", "copy"]),
        ({"position": ["top", "5-9"]}, ["lesa top", "lesa 5-9"]),
        ({"zero_init": [True, False]}, ["lesa zero-init", "lesa no zero-init"]),
        ({"label": "mine", "zero_init": True}, ["mine"]),
        ({"label": "mine", "position": "top", "lesa": {"rank": [8, 16]}}, ["mine rank=8", "mine rank=16"]),
        ({"method": ["lesa", "solar"], "label": "mine"}, ["mine lesa", "mine solar"]),
        ({"train": ["new", "new,norms"]}, ["lesa train=new", "lesa train=new,norms"]),
        ({"variants": [["x/one"], ["x/one", "s3://y/two"]]}, ["lesa variants=one", "lesa variants=one,two"]),
    ],
)
def test_names_say_what_differs(entry: dict[str, Any], names: list[str]) -> None:
    assert [arm.name for arm in arms(arms=entry)] == names


def test_long_names_that_differ_at_their_end_alone_are_two() -> None:
    grid = {"method": "aligned-lesa", "position": "uniform", "lesa": {"predictor": "ridge", "ridge": [1.0, 10.0]},
            "pretrain": {"learning_rate": [2e-4, 2e-5]}}  # fmt: skip
    found = arms(arms=grid)
    slugs = [arm.slug for arm in found]
    assert len(found[0].name) > 60
    assert len(set(slugs)) == 4
    for slug in slugs:
        assert len(slug) <= 50
        assert slug.startswith("aligned-lesa-uniform-predictor-ridge-ridge-")
    assert arms()[0].slug == "lesa"


def test_names_in_any_letters_are_places_of_their_own() -> None:
    slugs = {Arm(name, "lesa").slug for name in ("基线", "方法", "方法 2", "Größe", "Gr-e")}
    assert len(slugs) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", slug) for slug in slugs)


def test_what_an_arm_is_given_comes_over_what_all_are() -> None:
    common = {"factor": 2, "position": "top", "zero_init": True, "lesa": {"epochs": 9, "rank": 4}, "importance": "f"}
    given = config(
        expand=common,
        arms=[{"lesa": {"epochs": 1}}, {"method": "solar", "layers": 7, "output_scale": 0.5},
              {"position": "most-important"}],
    )  # fmt: skip
    first, second, third = (expand_settings(given, arm) for arm in arms_of(given, "file")[0])
    assert first == {
        "factor": 2, "position": "top", "zero_init": True, "lesa": {"epochs": 1, "rank": 4}, "method": "lesa"
    }  # fmt: skip
    assert second == {"position": "top", "layers": 7, "output_scale": 0.5, "method": "solar"}  # LESA's are not for it
    assert third["importance"] == "f"


def test_controls_are_there_unless_they_are_left_out_and_follow_the_reference() -> None:
    entry = [{"method": "solar"}, {"method": "lesa", "position": "bottom", "factor": 2, "train": "all"}]
    found = controls(arms=entry, reference="lesa bottom factor=2 train=all")
    assert list(found) == CONTROLS
    assert all(arm.control for arm in found.values())
    tokens, compute, random, copy = found.values()
    assert (tokens.method, tokens.pretrain, tokens.compute_of) == (None, {"train": "all"}, None)
    assert compute.compute_of == "lesa bottom factor=2 train=all"
    assert random.expand == {"position": "bottom", "factor": 2, "zero_init": True}
    assert copy.expand == {"position": "bottom", "factor": 2, "zero_init": False}
    assert random.pretrain == copy.pretrain == {"train": "all"}
    assert controls(arms=entry)["copy"].expand == {"zero_init": False}  # solar's positions are no others'
    assert controls()["copy"].expand == {"position": "top", "zero_init": False}  # LESA's, as published
    left = controls(controls={"plain_copies": False, "base_same_compute": False})
    assert list(left) == [CONTROLS[0], CONTROLS[2]]


def test_a_control_that_the_file_names_itself_is_not_there_twice() -> None:
    entry = [{"method": "lesa"}, {"method": "copy", "position": ["top", "uniform"], "zero_init": False}]
    named, added = arms_of(config(arms=entry), "file")
    assert [(arm.name, arm.control) for arm in named][1:] == [
        ("copy top no zero-init", True), ("copy uniform no zero-init", False)
    ]  # fmt: skip
    assert [arm.name for arm in added] == CONTROLS[:3]


def test_the_base_may_be_trained_on_with_settings_of_its_own() -> None:
    entry = [{"method": "base", "pretrain": {"learning_rate": [1e-4, 2e-4]}}, {"method": "lesa"}, {"method": "base"}]
    named, added = arms_of(config(arms=entry), "file")
    assert [arm.name for arm in named] == ["base learning-rate=0.0001", "base learning-rate=0.0002", "lesa", "base"]
    assert [arm.control for arm in named] == [True, True, False, True]
    assert (named[0].method, named[0].pretrain) == (None, {"learning_rate": 1e-4, "train": "all"})
    # the last is what the control would be, and the reference the first that grows
    assert [arm.name for arm in added] == CONTROLS[1:]
    assert added[0].compute_of == "lesa"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": {"method": "base"}}, "file: arms: none grows the base; name a method"),
        ({"arms": {"method": "base", "train": "new"}}, "file: arms: base train=new: train: the base has no new layers"),
        ({"arms": {"method": ["lesa", "base"], "position": "top"}}, "base top: position: the base has no new layers"),
        ({"arms": {"method": "base", "pretrain": {"insert_over": 0.5}}}, "insert_over: the base has no new layers"),
        ({"arms": [{}, {"method": "base"}], "reference": "base"}, "'base' is not the name of an arm that grows"),
        ({"arms": []}, "file: arms: Tuple should have at least 1 item"),
        ({"arms": {"metod": "lesa"}}, "file: arms.metod: is no setting of `lesa-ray expand`"),
        ({"arms": {"seed": 1}}, "file: arms.seed: is given by the comparison itself"),
        ({"arms": {"pretrain": {"steps": 5}}}, "file: arms.pretrain.steps: is the same for all arms"),
        ({"arms": {"pretrain": {"eval_rows": 5}}}, "file: arms.pretrain.eval_rows: is the same for all arms"),
        ({"pretrain": {"eval_rows": 0}}, "file: pretrain.eval_rows: 0 leaves nothing to compare"),
        ({"evaluate": {"limit": 3}}, "file: evaluate: is for tasks, and none is named"),
        ({"arms": {"label": ["a", "b"]}}, "file: arms.label: must be a text"),
        ({"arms": {"label": "–"}}, "file: arms: label '–': has no letter or digit"),
        ({"arms": [{"position": "top"}, {"position": "top"}]}, "'lesa top' and 'lesa top' have one name"),
        ({"arms": {"label": "base, untrained"}}, "'base, untrained' and 'base, untrained' have one name"),
        ({"arms": {"method": [["lesa"]]}}, "method must be a name"),
        (
            {"reference": "solar"},
            "file: reference: 'solar' is not the name of an arm that grows the base; there are lesa",
        ),
        ({"controls": {"random": False}}, "file: controls.random: Extra inputs"),
        ({"data": "text"}, "file: give data (text) or blocks (token blocks), one of the two"),
        ({"blocks": None}, "file: give data (text) or blocks (token blocks), one of the two"),
        ({"tokenize": {"seq_len": 5}}, "file: blocks: are tokenized already"),
        ({"seeds": [1, 1]}, "file: seeds: one is there twice"),
        ({"seeds": []}, "file: seeds: "),
        ({"pretrain": {"steps": 5}}, "file: pretrain.steps: is given by the comparison itself; name `tokens` beside"),
        ({"expand": {"method": "lesa"}}, "file: expand.method: is given by the comparison itself; name it in `arms`"),
        ({"name": "a/b"}, "file: name: name 'a/b'"),
        ({"seeds": [0, -1]}, "file: seeds: Input should be greater than or equal to 0"),
        ({"losses": [float("nan")]}, "file: losses: Input should be a finite number"),
        ({"arms": {"position": []}}, "file: arms.position: is an empty list"),
        ({"arms": {"lesa": {"epochs": []}}}, "file: arms.lesa.epochs: is an empty list"),
        ({"arms": {"method": {"lesa": 1}}}, "method must be a name"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        arms_of(config(**change), "file")
    assert says in str(error.value)
