"""No code but ours lies in the folder of a layer-wise scaled model, as our word is to load it with its code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesa_ray import Expanded
from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.layerwise.names import AUTO_MAP, CODE_FILES, MODEL_TYPE
from lesa_ray.training.export import ExportPlan, finish_export
from tests.layerwise.models import small_architecture, write_checkpoint

Grow = Callable[..., Expanded]
Bases = Callable[[str], str]
FOREIGN = {
    "AutoConfig": "org/name--other.Config",
    "AutoModelForCausalLM": "other.Model",
    "AutoTokenizer": "other.Words",
}


@pytest.fixture
def base(bases: Bases, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a family that brings code of its own."""

    def make(family: str) -> Path:
        folder = tmp_path / family
        if family == MODEL_TYPE:
            write_checkpoint(folder, small_architecture())
        else:
            shutil.copytree(bases(family), folder)
        for name in (*CODE_FILES, "other.py"):
            (folder / name).write_text("raise SystemExit('not ours')")
        for name, content in (
            ("config.json", json.loads((folder / "config.json").read_text())),
            ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
            ("preprocessor_config.json", {"feature_size": 1}),
        ):
            (folder / name).write_text(json.dumps({**content, "auto_map": FOREIGN}))
        return folder

    return make


def code_in(folder: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The Python files of a folder, and what of each configuration names code."""
    files = {path.name: path.read_text() for path in Path(folder).glob("*.py")}
    named = {path.name: json.loads(path.read_text()).get("auto_map") for path in Path(folder).glob("*config.json")}
    return files, {name: mapped for name, mapped in named.items() if mapped is not None}


def assert_ours_alone(folder: str) -> None:
    files, named = code_in(folder)
    assert files.keys() == {*CODE_FILES}
    assert not any("not ours" in text for text in files.values())
    assert named == {"config.json": AUTO_MAP}
    assert json.loads(Path(folder, "tokenizer_config.json").read_text()) == {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize(("family", "new_width"), [(MODEL_TYPE, None), (MODEL_TYPE, 0.5), ("llama", 0.5)])
def test_an_expansion_brings_our_code_alone(
    family: str, new_width: float | None, base: Callable[[str], Path], grow: Grow
) -> None:
    wider = {} if new_width is None else {"new_width": new_width}
    assert_ours_alone(grow(str(base(family)), method="copy", layers=7, **wider).out)


def test_so_does_what_is_trained(base: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_checkpoint(str(base(MODEL_TYPE)))
    out, state = str(tmp_path / "out"), None  # no tensor of it is asked for
    plan = ExportPlan(out, opened, state, (), {}, opened.config, str(base("llama")))  # type: ignore[arg-type]
    finish_export(plan, {})
    assert_ours_alone(out)


def test_code_of_an_ordinary_model_stays_its_own(base: Callable[[str], Path], grow: Grow) -> None:
    """Nobody is told to run it."""
    files, named = code_in(grow(str(base("llama")), method="copy", layers=7).out)
    assert "other.py" in files
    assert named["config.json"] == named["tokenizer_config.json"] == FOREIGN
