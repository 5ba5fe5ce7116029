"""What a checkpoint's names hold cannot steer the terminal."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from lesa_ray import UserError
from lesa_ray.ending import ending
from lesa_ray.report.console import Console
from lesa_ray.report.terminal import log_line

NAME = "q\x1b]0;title\x9b2J\x7f, a name\r\b\x07"
SHOWN = "q\ufffd]0;title\ufffd2J\ufffd, a"


def test_control_characters_of_a_name_are_not_sent() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    table = Table("type")
    table.add_row(NAME)
    for shown in (NAME, Text(NAME, style="bold"), table):
        console.print(shown, highlight=False)
    said = out.getvalue()
    assert said.count(SHOWN) == 3
    assert "\x1b[1m" in said  # rich's own
    for sign in ("\x1b]", "\x07", "\x9b", "\x7f", "\r", "\b"):
        assert sign not in said


def test_nor_are_those_of_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (UserError(f"tensor {NAME}: no"), OSError(f"tensor {NAME}: no")):
        end = ending(error)
        assert end is not None
        assert f"tensor {SHOWN}" in end[0]
    log_line("expand", f"unit {NAME}")
    err = capsys.readouterr().err
    assert f"unit {SHOWN}" in err
    assert "\x1b" not in err
