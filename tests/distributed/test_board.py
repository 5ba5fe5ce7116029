"""What tasks say of themselves, and a board that does not answer."""

from __future__ import annotations

import pytest
import ray

from lesa_ray.distributed import board as module
from lesa_ray.distributed.board import new_board, on_board, open_board, posting
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_task_says_that_it_has_begun_and_each_new_phase_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POST_SECONDS", 1e9)
    with open_board() as board:
        assert on_board(board) == {}
        post = posting(board, "unit")
        assert on_board(board) == {"unit": ("starting", 0.0)}
        post("tasks, 1 answers", 0.1)
        post("tasks, 2 answers", 0.2)  # of the same phase, and soon
        assert on_board(board) == {"unit": ("tasks, 1 answers", 0.1)}
        monkeypatch.setattr(module, "POST_SECONDS", 0.0)
        post("tasks, 3 answers", 0.3)
        assert on_board(board) == {"unit": ("tasks, 3 answers", 0.3)}


def test_no_work_depends_on_a_board() -> None:
    board = new_board()
    ray.get(board.put.remote("unit", "train", 0.5))
    assert on_board(board) == {"unit": ("train", 0.5)}
    ray.kill(board)
    until(lambda: on_board(board) is None)  # Ray ends an actor a little after the call returns
