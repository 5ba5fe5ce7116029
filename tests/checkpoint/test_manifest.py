"""An `expansion.json` that does not belong to the model beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import ExpandConfig, UserError
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.subject import open_subject
from lesa_ray.checkpoint.manifest import own_manifest
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.distributed.finetune import _check_model
from lesa_ray.expansion.out import out_state
from lesa_ray.expansion.prepare import prepare
from lesa_ray.training.run import prepare as prepare_run
from lesa_ray.training.train_settings import FinetuneConfig, TrainConfig
from tests import families
from tests.training.blocks import make_blocks

Foreign = Callable[[dict[str, Any] | None], str]
DEPTH = families.LAYERS + 1
FLAWS: list[tuple[dict[str, Any] | None, str]] = [
    (None, "it is not of lesa-ray's form"),
    ({"train": 3}, "it is not of lesa-ray's form"),
    ({"new_layers": 3}, "it is not of lesa-ray's form"),
    ({"layers": []}, f"it tells of 0 layers, the model has {DEPTH}"),
    ({"layers": [{}] * (DEPTH + 1)}, f"it tells of {DEPTH + 1} layers, the model has {DEPTH}"),
    ({"new_layers": [DEPTH]}, f"it calls layer {DEPTH} new, the model has {DEPTH} layers"),
    ({"new_layers": [-1]}, f"it calls layer -1 new, the model has {DEPTH} layers"),
    ({"new_layers": [True]}, "it calls layer True new"),
    ({"new_layers": ["1"]}, "it calls layer '1' new"),
    ({"new_layers": [*range(DEPTH)]}, f"it calls all {DEPTH} layers new"),
]


@pytest.fixture
def foreign(bases: Callable[[str], str], grow: Callable[..., Any]) -> Foreign:
    """A grown model with changes to its manifest; None: with another file of that name."""

    def make(changes: dict[str, Any] | None) -> str:
        grown = grow(bases("llama"), method="llama-pro", layers=DEPTH)
        assert own_manifest(Storage(grown.out), DEPTH, "x", needed=True) == grown.manifest
        content = {} if changes is None else {**grown.manifest, **changes}
        Path(grown.out, "expansion.json").write_text(json.dumps(content))
        out: str = grown.out
        return out

    return make


@pytest.mark.parametrize(("changes", "why"), FLAWS)
def test_it_is_told_where_it_is_needed(changes: dict[str, Any] | None, why: str, foreign: Foreign) -> None:
    base = foreign(changes)
    with pytest.raises(UserError, match=r"^BASE .*: its expansion.json is not this model's: .*; remove it, or") as told:
        open_subject(AnalyzeConfig(base=base))
    assert why in str(told.value)
    assert own_manifest(Storage(base), DEPTH, "x", needed=False) is None


@pytest.mark.parametrize("changes", [None, {"new_layers": [9]}])
def test_training_needs_it_where_it_says_what_is_new(
    changes: dict[str, Any] | None, foreign: Foreign, tmp_path: Path
) -> None:
    base, data = foreign(changes), make_blocks(str(tmp_path / "blocks"))
    given = {"checkpoint": base, "data": data, "out": str(tmp_path / "out"), "steps": 3, "batch": 2}
    for needing in ({}, {"train": "new"}, {"train": "all", "insert_over": 0.5}):
        with pytest.raises(UserError, match=r"^checkpoint .*: its expansion.json is not this model's"):
            prepare_run(TrainConfig.model_validate({**given, **needing}), gpus=False)
    with pytest.raises(UserError, match=r"^checkpoint .*: its expansion.json is not this model's"):
        _check_model(FinetuneConfig.model_validate({**given, "seq_len": 16, "train": "new"}))
    assert prepare_run(TrainConfig.model_validate({**given, "train": "all"}), gpus=False).manifest is None


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", "3"])
def test_what_is_no_manifest_at_all_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "expansion.json").write_text(content)
    assert own_manifest(Storage(str(tmp_path)), DEPTH, "x", needed=True) is None


def test_a_place_that_holds_one_is_not_taken(foreign: Foreign, bases: Callable[[str], str]) -> None:
    expansion = prepare(ExpandConfig(base=bases("llama"), out=foreign(None), method="llama-pro", layers=DEPTH))
    with pytest.raises(UserError, match=r"OUT .*: holds a checkpoint; give a new place"):
        out_state(expansion)
