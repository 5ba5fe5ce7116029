"""Help that names every key of a YAML file, also those that are no options."""

from __future__ import annotations

import re

import pytest

from lesa_ray.cli_keys import keys_of
from lesa_ray.comparison.settings import ComparisonConfig, Controls
from lesa_ray.config import LesaSettings, Settings
from lesa_ray.fleet.settings import Amount, Family, FleetConfig
from tests.test_cli import run


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("compare", (ComparisonConfig, Controls, Amount)),
        ("fleet", (FleetConfig, Family, Amount)),
        ("expand", (LesaSettings,)),
        ("inspect", (LesaSettings,)),
        ("analyze", (LesaSettings,)),
    ],
)
@pytest.mark.parametrize("columns", [80, 60])
def test_every_key_is_in_the_help(
    command: str,
    kinds: tuple[type[Settings], ...],
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, monkeypatch, command, "--help")
    shown = out.partition("\nKeys of ")[2]
    assert code == 0
    for name in (name for kind in kinds for name in kind.model_fields):
        assert re.search(rf"^ {{2,8}}{name}:? +\S", shown, re.MULTILINE), name  # text begins further right
    assert "Undefined" not in shown
    assert max(map(len, shown.splitlines())) <= columns


def test_keys_stand_as_in_the_file() -> None:
    _, rows = keys_of("compare")
    names = [name for name, _ in rows]
    assert names[2:6] == ["resources:", "  STAGE:", "    cpus", "    gpus"]
    told = dict(rows)
    assert told["  random_zero_output"].endswith("begin by writing nothing. [default: true]")
    assert told["tokens"].endswith("[required]")
    lesa = dict(keys_of("expand")[1])
    assert lesa["  batch_size"] == "Rows in a batch (released code). [default: 64]"
    assert lesa["  share_experts"] == "--share-experts"


@pytest.mark.parametrize("command", ["tokenize", "pretrain", "runs", None])
def test_other_commands_have_options_alone(command: str | None) -> None:
    assert keys_of(command) == ("", [])
