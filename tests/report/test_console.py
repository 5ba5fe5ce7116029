"""What a checkpoint's names hold cannot steer the terminal, and a narrow terminal loses no figure."""

from __future__ import annotations

import io

import pytest
from rich.box import SIMPLE_HEAD, Box
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


def lines_of(table: Table, width: int) -> list[list[str]]:
    """The words of each line but those of the box."""
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return [line.split() for line in lines if any(letter.isalnum() for letter in line)]


def figures(box: Box | None = None) -> Table:
    table = Table(box=box, title="T", caption="C", show_edge=False)
    table.add_column("unit", no_wrap=True)
    for name in ("load", "gram", "project"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("mlp", "1.25", "2.50", "37.75")
    return table


@pytest.mark.parametrize("box", [None, SIMPLE_HEAD])
def test_columns_that_do_not_fit_follow_below_beside_the_first(box: Box | None) -> None:
    whole = [["T"], ["unit", "load", "gram", "project"], ["mlp", "1.25", "2.50", "37.75"], ["C"]]
    assert lines_of(figures(box), 40) == whole
    assert lines_of(figures(box), 24) == [
        ["T"],
        ["unit", "load", "gram"],
        ["mlp", "1.25", "2.50"],
        ["unit", "project"],
        ["mlp", "37.75"],
        ["C"],
    ]


def test_a_column_that_may_wrap_does_so_first() -> None:
    table = Table("checkpoint", "loss", box=None)
    table.columns[0].overflow = "fold"
    table.columns[1].no_wrap = True
    table.add_row("s3://bucket/" + "x" * 30, "2.5031")
    said = lines_of(table, 30)
    assert said[0] == ["checkpoint", "loss"]
    assert said[1][1] == "2.5031"
    assert "".join(line[0] for line in said[1:]) == "s3://bucket/" + "x" * 30


def test_words_and_values_side_by_side_are_no_such_table() -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("memory", "largest process 640 MB, a node 1.29 GB")
    assert lines_of(grid, 30)[0][:3] == ["memory", "largest", "process"]
