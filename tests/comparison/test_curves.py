"""Curves from rows of metrics, where they reach a loss, and what is said of the arms' final losses."""

from __future__ import annotations

from typing import Any

import pytest

from lesa_ray.comparison.collect import all_reached
from lesa_ray.comparison.curves import Point, curve, reached, whole
from lesa_ray.report.comparison import comparison_table, reading


def rows(paces: dict[int, float], heldout: dict[int, float]) -> list[dict[str, Any]]:
    """Metrics as the trainer writes them: ten tokens and 600 FLOPs a step, the pace at the end of each window."""
    found: list[dict[str, Any]] = []
    for step in range(7):
        if step:
            row: dict[str, Any] = {"step": step, "loss": 9.0, "tokens": 10.0 * step}
            if step in paces:
                row |= {"tokens_per_second": paces[step], "model_flops_per_second": 60 * paces[step]}
            found.append(row)
        if step in heldout:
            found.append({"step": step, "heldout_loss": heldout[step]})
    return found


def test_a_curve_is_of_the_tokens_seconds_and_flops_of_training_alone() -> None:
    points = curve(rows({2: 5.0, 3: 10.0, 6: 2.0}, {0: 4.0, 3: 3.0, 6: 2.5}))
    assert points == [
        Point(step=0, tokens=0, seconds=0.0, flops=0.0, loss=4.0),
        Point(step=3, tokens=30, seconds=20 / 5 + 10 / 10, flops=1800.0, loss=3.0),
        Point(step=6, tokens=60, seconds=5 + 30 / 2, flops=3600.0, loss=2.5),
    ]
    assert curve([]) == []
    assert curve([{"step": 0, "heldout_loss": None}]) == []  # a loss that was no number


def test_a_loss_is_reached_between_two_measurements() -> None:
    whole, run = {"inserted_tokens": None}, {"curve": curve(rows({3: 10.0, 6: 5.0}, {0: 4.0, 3: 3.0, 6: 2.5}))}
    assert [reached(whole, run, level, "tokens") for level in (4.5, 3.0, 2.5, 2.4)] == [0, 30, 60, None]
    assert reached(whole, run, 3.5, "tokens") == pytest.approx(15)
    assert reached(whole, run, 2.75, "seconds") == pytest.approx(3 + 3)
    assert reached(whole, run, 2.75, "flops") == pytest.approx(2700)
    assert reached(whole, {"curve": []}, 9.0, "tokens") is None


def test_a_model_with_gates_reaches_nothing() -> None:
    run = {"curve": curve(rows({3: 10.0, 6: 5.0}, {0: 2.0, 3: 3.0, 6: 2.5}))}
    assert [point["step"] for point in whole({"inserted_tokens": 30}, run)] == [3, 6]
    assert reached({"inserted_tokens": 30}, run, 2.6, "tokens") == pytest.approx(54)
    assert reached({"inserted_tokens": None}, run, 2.6, "tokens") == 0


def arm(name: str, losses: list[float | None], control: bool = False) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "status": "failed" if loss is None else "complete",
            "problem": "expand/x: no room" if loss is None else None,
            "loss_before": 5.0,
            "final_loss": loss,
            "tuned_loss": None,
            "curve": [] if loss is None else curve(rows({6: 10.0}, {0: 5.0, 6: loss})),
        }
        for seed, loss in enumerate(losses)
    ]
    return {
        "name": name, "control": control, "method": "lesa", "layers": 6, "parameters": 1000, "trained_parameters": 100,
        "runs": runs,
    }  # fmt: skip


def content(*arms: dict[str, Any]) -> dict[str, Any]:
    notes = {"remarks": ["lesa: comes in slowly"], "notes": ["control copy: left out"]}
    base = {"loss": 5.0, "layers": 4, "parameters": 900}
    return {"base": base, "arms": list(arms), "reference": arms[0]["name"], **notes}


def test_what_the_table_says_is_what_was_measured() -> None:
    lesa, copy, lost = arm("lesa", [3.0, 3.2]), arm("copy", [4.0, 4.2], control=True), arm("lost", [None, None])
    table = comparison_table(content(lesa, copy, lost))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["lesa", "copy", "base, untrained", "lost"]  # the best first
    assert cells[5] == ["3.1000", "4.1000", "5.0000", "–"]
    assert table.columns[6].header == "SD"
    assert cells[6] == ["0.1414", "0.1414", "–", "–"]
    assert cells[7] == ["60", "not reached", "–", "–"]  # where the reference's run of the same seed ended
    assert cells[8] == ["6.0 s", "–", "–", "–"]
    assert cells[-1] == ["2 of 2", "2 of 2", "–", "0 of 2; seed 0: expand/x: no room; seed 1: expand/x: no room"]
    lesa["runs"][1]["tuned_loss"] = 1.5
    tuned = next(column for column in comparison_table(content(lesa, copy)).columns if column.header == "tuned")
    assert list(tuned.cells) == ["1.5000", "–", "–"]
    early = comparison_table(content(arm("lesa", [3.0, 3.2]), arm("copy", [2.0, 3.4], control=True)))
    assert list(early.columns[7].cells) == ["in 1 of 2", "60", "–"]


def test_what_is_said_of_the_table_is_what_the_intervals_leave_open() -> None:
    lesa, copy = arm("lesa", [3.0, 3.2, 3.1]), arm("copy", [4.0, 4.2, 4.11], control=True)
    assert reading(content(lesa, copy, arm("lost", [None, None, None]))) == [
        "ref.: lesa, with the same seed",
        "lesa ends lowest, before copy by 1.0033 ± 0.0255 (95 % over 3 seeds, for all pairs)",
        "the best control is copy, 4.1033",
        "controls that lesa does not clearly end below: none",
        "methods clearly below every control, each by its own interval: lesa",
        "methods not clearly below the untrained base: none",
        "lesa: comes in slowly",
        "control copy: left out",
    ]
    near = arm("copy", [3.05, 3.21, 3.25], control=True)  # worse with every seed
    said = reading(content(lesa, near, arm("late", [4.9, 5.3, 4.2])))
    assert (
        "before copy by 0.0700 ± 0.4532 (95 % over 3 seeds, for all pairs): not told apart, so not a finding" in said[1]
    )
    assert said[3:6] == [
        "controls that lesa does not clearly end below: copy",
        "methods clearly below every control, each by its own interval: none",
        "methods not clearly below the untrained base: late",
    ]
    alone = reading(content(arm("lesa", [3.0]), arm("copy", [3.1], control=True)))
    assert "by 0.1000 with one seed" in alone[1]
    assert alone[3] == "with one seed no method is told apart from a control"
    unknown = content(lesa, copy)
    unknown["base"]["loss"] = None
    assert reading(unknown)[5] == "the untrained base's loss is not known: no control here trains the base"


def test_an_arm_that_lost_seeds_is_not_the_best() -> None:
    """Its mean is the lowest, of the one seed that is easy for all."""
    lost, b, c = arm("lost", [2.0, None, None]), arm("b", [1.9, 2.2, 2.2]), arm("c", [1.95, 2.3, 2.3], control=True)
    found = content(lost, b, c, arm("none", [None] * 3))
    assert list(comparison_table(found).columns[0].cells) == ["b", "c", "base, untrained", "lost", "none"]
    said = reading(found)
    assert said[1].startswith("b ends lowest, before c by 0.0833 ± ")
    assert said[2] == "not ranked, a seed that others have is lacking: lost"
    assert said[3:5] == ["the best control is c, 2.1833", "controls that b does not clearly end below: none"]
    assert reading(content(lost, arm("late", [None, 2.0, None])))[1].startswith("not ranked")


def test_a_level_is_that_of_the_same_seed() -> None:
    """The second seed's data is harder for both; each run of lesa ends below copy's of its seed, in the mean above."""
    lesa, copy = arm("lesa", [3.0, 4.4, 3.1]), arm("copy", [3.1, 4.5, 3.2], control=True)
    of_copy, of_lesa = all_reached([lesa, copy], (0, 1, 2), ())
    assert (of_copy["of"], of_copy["levels"], of_copy["loss"]) == ("copy", [3.1, 4.5, 3.2], pytest.approx(3.6))
    assert of_copy["arms"]["copy"] == [60, 60, 60]
    lost = arm("lost", [2.9, None, None], control=True)
    assert [one["of"] for one in all_reached([lesa, lost, copy], (0, 1, 2), ())] == ["copy", "lesa"]
    assert of_copy["arms"]["lesa"] == pytest.approx([60 * 1.9 / 2.0, 60 * 0.5 / 0.6, 60 * 1.8 / 1.9])
    assert of_copy["flops"]["lesa"] == pytest.approx([60 * tokens for tokens in of_copy["arms"]["lesa"]])
    assert of_lesa["arms"] == {"lesa": [60, 60, 60], "copy": [None, None, None]}
    (named,) = all_reached([lesa, copy], (0, 1, 2), (3.15,))
    assert (named["of"], named["levels"]) == (None, [3.15, 3.15, 3.15])
    assert [tokens is None for tokens in named["arms"]["copy"]] == [False, True, True]
    lost = arm("lost", [3.0, None, 3.0])
    of_lost = all_reached([lesa, lost], (0, 1, 2), ())[1]
    assert (of_lost["of"], of_lost["levels"], of_lost["arms"]["lost"]) == ("lost", [3.0, None, 3.0], [60, None, 60])
