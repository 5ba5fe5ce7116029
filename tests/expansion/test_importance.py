"""Positions by importance: new layers go above the layers that do most, or least; the figures are of this base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, UserError
from lesa_ray.checkpoint.manifest import read_manifest
from lesa_ray.checkpoint.reader import SAMPLED, open_checkpoint
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.plan import gaps_by_importance
from lesa_ray.expansion.prepare import prepare

Bases = Callable[[str], str]
COSINES = [0.5, 0.9, 0.7, 0.8, 0.1]


@pytest.fixture
def analysis(bases: Bases, tmp_path: Path) -> Callable[..., str]:
    """An analysis.json of the tiny Llama, with changes."""

    def write(name: str = "analysis.json", **changes: Any) -> str:
        content = {
            "kind": "analysis",
            "version": 1,
            "checkpoint": "somewhere",
            "identity": {"weights": open_checkpoint(bases("llama")).digests()},
            "layers": 5,
            "residual": {"layers": [{"cosine": cosine} for cosine in COSINES]},
        }
        (tmp_path / name).write_text(json.dumps(content | changes))
        return str(tmp_path / name)

    return write


def planned(base: str, **settings: Any) -> Expansion:
    return prepare(ExpandConfig.model_validate({"base": base, "out": "out", "method": "avg-deus", **settings}))


def gaps(expansion: Expansion) -> list[int]:
    return sorted(slot.lower for slot in expansion.job.plan.slots)


@pytest.mark.parametrize(
    ("position", "count", "expected"),
    [
        ("most-important", 2, "0,2"),  # layer 4 does most, and has no gap above it
        ("most-important", 3, "0,2,3"),
        ("least-important", 1, "1"),
        ("least-important", 2, "1,3"),
        ("least-important", 4, "0,1,2,3"),
    ],
)
def test_gaps_follow_the_influence(position: str, count: int, expected: str) -> None:
    assert gaps_by_importance(position, [1 - cosine for cosine in COSINES], count) == expected


def test_of_equal_layers_the_lower_one_is_taken() -> None:
    assert gaps_by_importance("most-important", [1.0] * 5, 2) == "0,1"
    assert gaps_by_importance("least-important", [1.0] * 5, 2) == "0,1"


def test_the_plan_is_that_of_the_named_gaps(bases: Bases, analysis: Callable[..., str]) -> None:
    base = bases("llama")
    by_figures = planned(base, layers=7, position="most-important", importance=analysis())
    assert by_figures.job.plan == planned(base, position="0,2").job.plan
    assert gaps(planned(base, factor=1.2, position="least-important", importance=analysis())) == [1]
    default = planned(base, position="least-important", importance=analysis())
    assert gaps(default) == [1, 2, 3]


def test_the_files_content_counts_and_not_its_place(bases: Bases, analysis: Callable[..., str]) -> None:
    base = bases("llama")
    settings = {"layers": 7, "position": "most-important"}
    first = planned(base, **settings, importance=analysis())
    assert planned(base, **settings, importance=analysis("elsewhere.json")).fingerprint == first.fingerprint
    other = planned(base, **settings, importance=analysis(note="made again"))
    assert other.fingerprint != first.fingerprint
    assert first.identity["settings"]["position"] == "most-important"


def test_an_expansion_says_what_it_followed(
    bases: Bases, analysis: Callable[..., str], grow: Callable[..., Any]
) -> None:
    out = grow(bases("llama"), method="llama-pro", layers=6, position="least-important", importance=analysis()).out
    manifest = read_manifest(Storage(out))
    assert manifest is not None
    assert manifest["new_layers"] == [2]
    assert len(manifest["identity"]["importance"]) == 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "comparison"}, "is not an analysis.json"),
        ({"residual": None}, "made without data"),
        ({"residual": {"layers": [{"cosine": 0.5}] * 4}}, "each of the 5 layers"),
        ({"residual": {"layers": [{"cosine": None}] * 5}}, "no cosine for each layer"),
        ({"residual": {"layers": [{"cosine": float("nan")}] * 5}}, "no finite cosine"),
        ({"layers": 6}, "is an analysis of somewhere, not of BASE"),
        ({"identity": {"weights": {}}}, "is an analysis of somewhere, not of BASE"),
        ({"identity": None}, "is an analysis of somewhere, not of BASE"),
    ],
)
def test_files_that_do_not_serve(
    changes: dict[str, Any], says: str, bases: Bases, analysis: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=says):
        planned(bases("llama"), position="most-important", importance=analysis(**changes))


def test_an_analysis_of_other_weights_of_the_same_names(bases: Bases, analysis: Callable[..., str]) -> None:
    weights = open_checkpoint(bases("llama")).digests()
    name = sorted(weights)[0]
    weights[name] = {**weights[name], "digest": f"{SAMPLED}0"}
    with pytest.raises(UserError, match="is an analysis of somewhere"):
        planned(bases("llama"), position="most-important", importance=analysis(identity={"weights": weights}))
    weights[name] = {**weights[name], "digest": "a-store's-own-tag"}
    kept = planned(bases("llama"), position="most-important", importance=analysis(identity={"weights": weights}))
    assert gaps(kept) == [0, 2, 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"position": "most-important"}, "needs importance: FILE"),
        ({"position": "top", "importance": "FILE"}, "alone"),
        ({"importance": "FILE"}, "alone"),
        ({"position": "least-important", "importance": "FILE", "layers": 10}, "chooses among the 4 gaps"),
        ({"position": "least-important", "importance": "nowhere.json"}, "there is no such file"),
        ({"position": "least-important", "importance": "BROKEN"}, "is not JSON"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], says: str, bases: Bases, analysis: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text('{"kind": ')
    places = {"FILE": analysis(), "BROKEN": str(tmp_path / "broken.json")}
    given = {**settings}
    if "importance" in given:
        given["importance"] = places.get(given["importance"], given["importance"])
    with pytest.raises(UserError, match=says):
        planned(bases("llama"), **given)
