"""What makes two stages the same, what tells them apart in words, and that no name leaves the store."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import lesa_ray
from lesa_ray import UserError
from lesa_ray.store.identity import Identity, canonical, checked_label, difference, parse_place

SETTINGS = {"learning_rate": 2e-4, "betas": [0.9, 0.95], "lesa": {"epochs": 5, "rank": None}}
STAGE = Identity("pretrain", {"data": "d", "checkpoint": {"stage": "abc"}}, SETTINGS, "0.1.0")


def test_the_place_is_the_hash_of_what_counts_whatever_the_order() -> None:
    mixed = Identity(
        "pretrain", {"checkpoint": {"stage": "abc"}, "data": "d"}, dict(reversed(SETTINGS.items())), "0.1.0"
    )
    assert mixed.digest == STAGE.digest
    assert STAGE.place("llama-lesa-x1.5") == f"pretrain/llama-lesa-x1.5-{STAGE.digest[:12]}"
    assert parse_place(STAGE.place("llama-lesa-x1.5")) == ("pretrain", "llama-lesa-x1.5", STAGE.digest[:12])
    others = [
        dataclasses.replace(STAGE, kind="finetune"),
        dataclasses.replace(STAGE, code="0.2.0"),
        dataclasses.replace(STAGE, inputs={**STAGE.inputs, "data": "e"}),
        dataclasses.replace(STAGE, settings={**SETTINGS, "learning_rate": 3e-4}),
    ]
    assert len({one.digest for one in [STAGE, *others]}) == 5


def test_the_hash_is_the_same_in_every_version() -> None:
    """It is the form of the store: a change here makes the results of all stores unfindable."""
    digest = "b754c07fe5212232a8bc15587642cdb13ae441d1999b1509ba2ccff24de65324"
    assert Identity("expand", {"base": "ä"}, {"b": 1, "a": [0.1, None, True]}, "1").digest == digest


def test_the_code_s_version_is_that_of_the_code_that_runs(tmp_path: Path) -> None:
    """A submitted job runs the sources that came with it, in an image where another version is installed."""
    code = Path(lesa_ray.__file__).parent
    assert read_configuration(code.parent / "pyproject.toml")["project"]["version"] == lesa_ray.__version__
    shutil.copytree(code, tmp_path / "lesa_ray", ignore=shutil.ignore_patterns("__pycache__"))
    first = tmp_path / "lesa_ray" / "__init__.py"
    first.write_text(first.read_text().replace(f'"{lesa_ray.__version__}"', '"9.8.7"'))
    asked = "from lesa_ray.store.identity import code_version; print(code_version())"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.stdout == "9.8.7\n", done.stderr


def test_numbers_that_json_has_no_word_for_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


@pytest.mark.parametrize(
    "label", ["..", "../up", "a/b", "/etc", "a..b", "", "-x", ".hidden", "a b", "a\n", "ä", "x" * 101, "s3://b", "a\\b"]
)
def test_a_label_cannot_leave_the_store(label: str) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        checked_label(label, "family")
    with pytest.raises(UserError):
        STAGE.place(label)


@pytest.mark.parametrize(
    "place",
    [
        "expand/../../x-0123456789ab",
        "other/x-0123456789ab",
        "expand/x-0123456789AB",
        "expand/x",
        "/expand/x-0123456789ab",
    ],
)
def test_only_places_of_stages_are_taken_for_them(place: str) -> None:
    assert parse_place(place) is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"code": "0.2.0", "settings": {}}, "code version changed: 0.1.0 → 0.2.0"),
        (
            {"settings": {**SETTINGS, "learning_rate": 4e-4}, "inputs": {}},
            "settings changed: pretrain.learning_rate (0.0002 → 0.0004)",
        ),
        (
            {"settings": {**SETTINGS, "lesa": {"epochs": 6, "rank": 3}, "new": 1}},
            "settings changed: pretrain.lesa.epochs (5 → 6), pretrain.lesa.rank (none → 3) and 1 more",
        ),
        ({"inputs": {**STAGE.inputs, "checkpoint": {"stage": "abd"}}}, "input changed: checkpoint"),
        ({"inputs": {"checkpoint": {"stage": "x"}, "more": 1}}, "input changed: checkpoint, data, more"),
    ],
)
def test_why_a_stage_is_another(changed: dict[str, object], says: str) -> None:
    assert difference(STAGE, dataclasses.replace(STAGE, **changed)) == says  # type: ignore[arg-type]
