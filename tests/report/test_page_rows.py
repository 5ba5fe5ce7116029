"""Rows of a long training run as the page draws them."""

from __future__ import annotations

import json
import statistics
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lesa_ray.report.page import rows
from lesa_ray.report.page.rows import thinned
from lesa_ray.report.page.sources import gather
from lesa_ray.training import metrics


def step(number: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, "tokens": 100.0 * number, **more}


def test_few_rows_stay_as_they_are() -> None:
    given = [{"step": 0, "heldout_loss": 5.0}, step(1, 4.0), step(2, 3.0), {"step": 2, "heldout_loss": 3.5}]
    assert thinned([{**row, "gradient_norm": 1.0} for row in given]) == given
    assert thinned([]) == []


def test_of_many_rows_means_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST", 8)
    losses = [5.0 - number / 10 + number % 3 for number in range(1, 31)]
    given: list[dict[str, Any]] = [{"step": 0, "heldout_loss": 6.0}]
    for number, loss in enumerate(losses, 1):
        given.append(step(number, loss, inserted=min(1.0, number / 10)))
        if number % 7 == 0:
            given.append({"step": number, "heldout_loss": float(number)})
    given.append(step(31, None, inserted=1.0))
    found = thinned(given)
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    assert [row for row in found if "heldout_loss" in row] == [row for row in given if "heldout_loss" in row]
    assert next(row for row in found if row.get("inserted") == 1) == step(10, losses[9], inserted=1.0)
    assert found[-1] == given[-1]
    plain = [row for row in found if row.get("loss") is not None and row["step"] != 10]
    assert [row["step"] for row in plain] == [4, 8, 13, 17, 21, 25, 29, 30]
    assert plain[2]["loss"] == pytest.approx(statistics.fmean(losses[at - 1] for at in (9, 11, 12, 13)))
    assert plain[-1] == step(30, losses[29], inserted=1.0)


def test_a_long_run_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST", 1024)
    monkeypatch.setattr(metrics, "_READ_BYTES", 2**16)
    (tmp_path / "training").mkdir()
    with (tmp_path / "training/metrics.jsonl").open("w") as file:
        for number in range(1, 15_001):
            more = {"gradient_norm": 1.0, "learning_rate": 1e-4 / number}
            file.write(json.dumps(step(number, 3.0 + 1 / number, **more)) + "\n")
    tracemalloc.start()
    (run,) = gather([str(tmp_path)]).trainings
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # all rows take 9 MB, the file 1.6
    assert len(run.rows) == -(-15_000 // 16)
    assert run.rows[-1]["tokens"] == 1_500_000
