"""The rows of a step: a pure function, every row once an epoch, the same whoever reads them."""

from __future__ import annotations

import numpy as np
import pytest

from lesa_ray.training.batches import WINDOW, cut, labelled, scored_tokens, spread, step_rows, worker_share
from lesa_ray.training.tokens import UNSCORED


@pytest.mark.parametrize(("rows", "group", "batch"), [(1, 4, 3), (10, 4, 4), (100, 4, 8), (331, 3, 7), (64, 64, 64)])
def test_every_row_once_an_epoch(rows: int, group: int, batch: int) -> None:
    steps = -(-3 * rows // batch)
    order = np.concatenate([step_rows(step, batch, rows, group, seed=1) for step in range(steps)])
    assert len(order) == steps * batch
    for epoch in range(3):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    if rows > 50:
        assert list(order[:rows]) != list(order[rows : 2 * rows])


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    straight = [step_rows(step, 8, 1000, 5, seed=3) for step in range(200)]
    backwards = [step_rows(step, 8, 1000, 5, seed=3) for step in reversed(range(200))]
    assert all(np.array_equal(a, b) for a, b in zip(straight, reversed(backwards), strict=True))
    assert not np.array_equal(straight[0], step_rows(0, 8, 1000, 5, seed=4))


def test_a_worker_holds_few_row_groups_at_a_time() -> None:
    """Within one window no more than WINDOW groups are touched, and each group in one stretch of the epoch only."""
    rows, group, batch = 10_000, 10, 20
    seen: dict[int, list[int]] = {}
    for step in range(rows // batch):
        for row in step_rows(step, batch, rows, group, seed=0):
            seen.setdefault(int(row) // group, []).append(step)
    longest = WINDOW * group // batch
    assert max(max(steps) - min(steps) for steps in seen.values()) <= longest


def test_each_window_epoch_and_seed_has_an_order_of_its_own() -> None:
    group, windows = 10, 3
    size = group * WINDOW
    together, within = set(), set()
    for seed in range(2):
        for window in range(2 * windows):  # two epochs
            order = step_rows(window, size, windows * size, group, seed)
            together.add(frozenset((order // group).tolist()))
            within.add(tuple((order % group).tolist()))
    assert len(together) == len(within) == 2 * 2 * windows
    assert frozenset(range(WINDOW)) not in together


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_workers_share_a_step_whatever_their_number(workers: int) -> None:
    indices = step_rows(5, 12, 100, 8, seed=0)
    shares = [worker_share(indices, rank, workers) for rank in range(workers)]
    assert len({len(own) for own, _ in shares}) == 1
    kept = [own[: len(own) - filler] for own, filler in shares]
    assert np.array_equal(np.concatenate(kept), indices)


def test_fillers_are_not_scored() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    found = labelled({"input_ids": ids}, 1)
    assert (found["labels"][2] == UNSCORED).all()
    assert (found["labels"][:2] == ids[:2]).all()
    assert scored_tokens(found["labels"]) == 6
    assert (ids == np.arange(12).reshape(3, 4)).all()
    assert [len(micro["labels"]) for micro in cut(found, 2)] == [2, 1]


def test_rows_for_the_held_out_loss_come_from_all_of_the_split() -> None:
    assert list(spread(4, 10)) == [0, 2, 5, 7]
    assert list(spread(7, 7)) == list(range(7))
    assert np.diff(spread(96, 5396)).min() >= 5396 // 96
