"""`lesa-ray analyze` on the command line, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lesa_ray.report.page import packages
from tests.evaluation import tiny
from tests.test_cli import run

Bases = Callable[[str], str]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=3)
    (tmp_path / "some.txt").write_text("To be, or not to be.")
    out = tmp_path / "seen"
    command = ["analyze", base, "--out", out, "--data", tmp_path / "some.txt", "--tokens", 15, "--no-page"]
    code, printed, _ = run(capsys, monkeypatch, *command, "--json")
    report = json.loads(printed)
    assert code == 0
    assert report == json.loads((out / "analysis.json").read_text())
    assert report["residual"]["tokens"] == 15
    assert len(report["residual"]["layers"]) == 3
    code, printed, line = run(capsys, monkeypatch, *command)
    assert (code, printed) == (0, "")
    assert "analysis.json" in line


def test_a_page_that_is_left_out_is_told_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whichever of the extra's packages is not there; without --out, or with --no-page, none was asked for."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=3)
    command = ["analyze", base, "--no-fit", "--no-match", "--json"]
    for package in ("matplotlib", "jinja2"):
        monkeypatch.setattr(packages, "find_spec", lambda name, package=package: None if name == package else object())
        assert run(capsys, monkeypatch, *command, "--out", tmp_path / package)[0] == 0
        assert [file.name for file in (tmp_path / package).iterdir()] == ["analysis.json"]
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / package}/analysis.html is left out: {package} is not installed; "
            "run `pip install 'lesa-ray[report]'`"
        ]
        caplog.clear()
    for more in ([], ["--out", tmp_path / "out", "--no-page"]):
        assert run(capsys, monkeypatch, *command, *more)[0] == 0
        assert not caplog.records


def poison(base: Path) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "model.layers.2.mlp.down_proj.weight") in tensors:
            tensors[name][0, 0] = math.nan
            save_file(tensors, file)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no such folder"),
        (["BASE", "--out", "BASE"], "lies inside BASE"),
        (["BASE", "--out", "BASE/config.json"], "lies inside BASE"),
        (["BASE", "--data", "nowhere.txt"], "there is no such file"),
        (["BASE", "--data", "BASE"], "no data found"),
        (["BASE", "--data", "TEXT"], "has no tokenizer"),
        (["BASE", "--tokens", "0"], "tokens"),
        (["BASE", "--device", "tpu"], "device"),
        (["BASE", "--nonsense"], "--nonsense"),
        (["BASE", "--memory-budget", "much"], "memory_budget"),
        (["MIXTRAL", "--match"], "--match: mixtral layers cannot be matched"),
        (["POISONED", "--out", "OUT"], "model.layers.2.mlp.down_proj.weight holds NaN"),
        ([], "BASE: missing"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    says: str,
    bases: Bases,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "some.txt"
    text.write_text("to be")
    places = {"BASE": bases("llama"), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    if "MIXTRAL" in arguments:
        places["MIXTRAL"] = bases("mixtral")
    if "POISONED" in arguments:
        places["POISONED"] = shutil.copytree(bases("llama"), tmp_path / "poisoned")
        poison(tmp_path / "poisoned")
    before = sorted(Path(bases("llama")).iterdir())
    given = [
        str(places[first]) + argument.removeprefix(first) if (first := argument.split("/")[0]) in places else argument
        for argument in arguments
    ]
    code, out, line = run(capsys, monkeypatch, "analyze", *given)
    assert (code, out) == (2, "")
    assert says in line
    assert not (tmp_path / "out").exists()
    assert sorted(Path(bases("llama")).iterdir()) == before


@pytest.mark.parametrize("command", ["analyze", "evaluate"])
def test_figures_whose_place_fails_at_the_end_are_printed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=3)
    (tmp_path / "some.txt").write_text("To be, or not to be.")
    name = {"analyze": "analysis.json", "evaluate": "evaluation.json"}[command]
    (tmp_path / "out" / name / "in-the-way").mkdir(parents=True)
    more = ["--no-page"] if command == "analyze" else ["--data", tmp_path / "some.txt", "--window", "16"]
    code, printed, line = run(capsys, monkeypatch, command, base, "--out", tmp_path / "out", *more, "--json")
    assert code == 1
    assert re.search(f"--out .*{name}: cannot be written \\(IsADirectoryError", line)
    assert json.loads(printed)[{"analyze": "types", "evaluate": "checkpoints"}[command]]
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {name, ".lesa-ray"}


@pytest.mark.parametrize("command", ["analyze", "evaluate"])
@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_place_that_is_full_is_found_before_the_work(
    command: str,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=3)
    (small_disk / "all").write_bytes(bytes(64 * 1024))
    data = ["--data", tmp_path / "nowhere.txt"]  # would be wrong input
    code, printed, line = run(capsys, monkeypatch, command, base, "--out", small_disk / "out", *data)
    assert (code, printed) == (1, "")
    assert "no space left on the device" in line
    assert not (small_disk / "out").exists()
