"""Whose OUT it is: what differs is named, runs of versions with fewer settings go on, places may move."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lesa_ray import UserError
from lesa_ray.distributed.export import export_checkpoint
from lesa_ray.training.run import RUN_FILE, Run, claim, out_state, prepare, use_bf16
from lesa_ray.training.train_settings import TrainConfig
from tests import families
from tests.training.blocks import make_blocks
from tests.training.workers import run_all, run_workers

Bases = Callable[[str], str]


@pytest.fixture
def given(bases: Bases, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(bases("llama_tied"), tmp_path / "base")
    data = make_blocks(str(tmp_path / "blocks"), rows=16)
    return {
        "checkpoint": str(tmp_path / "base"), "data": data, "out": str(tmp_path / "out"), "steps": 2, "batch": 2,
        "train": "all",
    }  # fmt: skip


def prepared(given: dict[str, Any], **changes: Any) -> Run:
    return prepare(TrainConfig.model_validate({**given, **changes}), gpus=False)


def rewrite(out: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = Path(out) / RUN_FILE
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def test_a_run_of_a_version_without_a_setting_goes_on(given: dict[str, Any]) -> None:
    claim(prepared(given))

    def older(record: dict[str, Any]) -> None:
        record["identity"], record["lesa_ray"] = "as-of-old", "0.0.9"
        del record["counted"]["settings"]["betas"]
        del record["counted"]["settings"]["weight_decay"]

    rewrite(given["out"], older)
    run = prepared(given)
    assert (run.identity, out_state(run)) == ("as-of-old", "resume")
    other = prepared(given, weight_decay=0.3)
    assert other.identity != "as-of-old"
    with pytest.raises(UserError, match=r"\(weight_decay: 0\.1 there, 0\.3 now, begun by lesa-ray 0\.0\.9, this is "):
        out_state(other)


def test_a_record_says_what_is_no_setting_any_more(given: dict[str, Any]) -> None:
    """Also one that has nothing to compare by."""
    claim(prepared(given))

    def with_more(record: dict[str, Any]) -> None:
        record["identity"], record["counted"]["settings"]["warp"] = "as-of-old", 9

    def with_less(record: dict[str, Any]) -> None:
        del record["counted"]

    for change, says in (
        (with_more, "settings (warp: 9 there, no setting now); give"),
        (with_less, "settings (it was begun by a version that did not say of what); give"),
    ):
        rewrite(given["out"], change)
        run = prepared(given)
        assert run.identity != "as-of-old"
        with pytest.raises(UserError, match=re.escape(says)):
            out_state(run)


@pytest.mark.parametrize("decided", [True, False])
def test_a_run_keeps_the_precision_that_was_decided_for_it(decided: bool, given: dict[str, Any]) -> None:
    """Whatever machine it goes on on."""
    claim(prepared(given))
    rewrite(given["out"], lambda record: record.update(bf16=decided))
    config = TrainConfig.model_validate(given)
    assert [use_bf16(config, gpus) for gpus in (True, False)] == [decided, decided]
    asked = config.model_copy(update={"precision": "fp32"})
    assert not use_bf16(asked, gpus=True)


def test_another_configuration_makes_another_run(given: dict[str, Any]) -> None:
    """The same weights under another epsilon are another model."""
    claim(prepared(given))
    file = Path(given["checkpoint"]) / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    with pytest.raises(UserError, match=r"\(another config\.json\);"):
        out_state(prepared(given))
    file.write_text(json.dumps(dict(reversed(config.items()))))
    assert out_state(prepared(given)) == "resume"


def test_what_differs_is_named_and_places_are_not(given: dict[str, Any], tmp_path: Path) -> None:
    claim(prepared(given))
    moved = {**given, "checkpoint": str(tmp_path / "elsewhere"), "data": str(tmp_path / "rows")}
    shutil.copytree(given["checkpoint"], moved["checkpoint"])
    shutil.copytree(given["data"], moved["data"])
    assert out_state(prepared(moved)) == "resume"
    for changes, says in (
        ({"learning_rate": 0.5}, "(learning_rate: 0.0002 there, 0.5 now);"),
        ({"steps": 3}, "(steps: 2 there, 3 now);"),
        ({"train": "norms"}, "(other parameters that are trained);"),
        ({"data": make_blocks(str(tmp_path / "other"), rows=20)}, "(other token blocks);"),
        ({"seed": 1, "batch": 4, "steps": 3}, "(batch: 2 there, 4 now, seed: 0 there, 1 now, steps: 2 there, 3 now);"),
        ({"seed": 1, "batch": 4, "steps": 3, "train": "norms"}, "and 1 more);"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            out_state(prepared(moved, **changes))
    file = Path(moved["checkpoint"]) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"\(other weights of the checkpoint\);"):
        out_state(prepared(moved))


@pytest.mark.timeout(240)
def test_a_run_is_exported_from_another_folder_and_after_a_move(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_workers(run_all, 1, {**given, "checkpoint": "base", "data": "blocks"})
    monkeypatch.chdir("/")
    export_checkpoint(given["out"], str(tmp_path / "one"), "last")
    one = families.tensors(tmp_path / "one")
    for name in ("base", "blocks", "out"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    out, base, data = (str(tmp_path / f"{name}-moved") for name in ("out", "base", "blocks"))
    with pytest.raises(UserError, match=rf"^RUN {out}: .*blocks.*if they were moved, say where .*: --base, --data"):
        export_checkpoint(out, str(tmp_path / "two"), "last")
    export_checkpoint(out, str(tmp_path / "two"), "last", base, data)
    two = families.tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

    other_rows = make_blocks(str(tmp_path / "again"), rows=32)  # of which an export tells the name alone
    rewrite(out, lambda record: record["config"].update(of_another_version=1))
    export_checkpoint(out, str(tmp_path / "three"), "last", base, other_rows)
    assert torch.equal(families.tensors(tmp_path / "three")["model.norm.weight"], two["model.norm.weight"])
    file = tmp_path / "base-moved/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^RUN {out}: .* changed since \(other weights of the checkpoint\)$"):
        export_checkpoint(out, str(tmp_path / "four"), "last", base, data)
