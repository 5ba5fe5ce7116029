"""How far tasks are, and which of them have begun, on a board at which the driver looks.

Ray does not tell a driver that a task of its own has found room and runs. Each task says so on the board, an actor
beside the driver, and how far it is from then on. No work depends on it: a board that does not answer says nothing."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from lesa_ray.distributed.cluster import on_this_machine

POST_SECONDS = 0.5
"""Between what a task says of the same phase."""
_ANSWER_SECONDS = 30

State = dict[str, tuple[str, float]]
"""By task: its phase, and its share that is done (0 to 1)."""


class Board:
    """Keeps how far each task is."""

    def __init__(self) -> None:
        self._state: State = {}

    def put(self, task: str, phase: str, share: float) -> None:
        self._state[task] = (phase, share)

    def get(self) -> State:
        return self._state


def new_board() -> Any:
    """A board, as an actor beside this process."""
    return ray.remote(num_cpus=0, scheduling_strategy=on_this_machine())(Board).remote()


@contextlib.contextmanager
def open_board() -> Iterator[Any]:
    """The same, for as long as the context lasts."""
    board = new_board()
    try:
        yield board
    finally:
        ray.kill(board)


def on_board(board: Any) -> State | None:
    """What is on a board; None where it does not answer."""
    with contextlib.suppress(RayError):
        state: State = ray.get(board.get.remote(), timeout=_ANSWER_SECONDS)
        return state
    return None


def posting(board: Any, task: str) -> Callable[[str, float], None]:
    """For a task that begins, which is said at once: a call with its phase and share from time to time. A new phase
    (what it says up to a comma) is put up at once, else the last of half a second."""
    board.put.remote(task, "starting", 0.0)
    last, shown = -math.inf, ""

    def post(phase: str, share: float) -> None:
        nonlocal last, shown
        if time.monotonic() - last > POST_SECONDS or phase.split(",")[0] != shown:
            last, shown = time.monotonic(), phase.split(",")[0]
            board.put.remote(task, phase, share)

    return post
