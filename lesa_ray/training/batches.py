"""The rows of each step: a pure function of (seed, step), whatever the number of workers.

Decides
- Every epoch goes through all rows once, in an order of its own. Row groups of the split are shuffled, then rows within
  windows of 16 groups (16 million tokens at the default size of a group), so that a worker reads whole groups, each
  once an epoch, and holds 16 of them (64 MB). A corpus of at most 16 groups is shuffled as a whole. What that costs:
  rows of different windows never meet in a step.
- An epoch's last batch is filled from the next epoch, so every batch is full and nothing is left out.
- The state of the data is the step: nothing to save, nothing to seek.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lesa_ray.training.tokens import UNSCORED

WINDOW = 16
"""Row groups that are shuffled together."""

Rows = dict[str, NDArray[np.int32]]


def step_rows(step: int, batch: int, rows: int, group: int, seed: int) -> NDArray[np.int64]:
    """Indices (batch,) of the rows of a step. rows: of the split; group: rows of a row group."""
    first = step * batch
    found: list[int] = []
    while len(found) < batch:
        epoch, place = divmod(first + len(found), rows)
        window, begin = _window_at(epoch, place, rows, group, seed)
        found += window[place - begin :][: batch - len(found)].tolist()
    return np.array(found, np.int64)


def _window_at(epoch: int, place: int, rows: int, group: int, seed: int) -> tuple[NDArray[np.int64], int]:
    """The shuffled rows of the window in which the epoch's row number `place` lies, and where the window begins."""
    ends = _window_ends(epoch, rows, group, seed)
    window = int(np.searchsorted(ends, place, side="right"))
    return _window_rows(epoch, window, rows, group, seed), int(ends[window - 1]) if window else 0


@lru_cache(maxsize=4)
def _group_order(epoch: int, rows: int, group: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch, 0]).permutation(-(-rows // group))


@lru_cache(maxsize=4)
def _window_ends(epoch: int, rows: int, group: int, seed: int) -> NDArray[np.int64]:
    order = _group_order(epoch, rows, group, seed)
    sizes = np.minimum(group, rows - order * group)
    ends: NDArray[np.int64] = np.cumsum(sizes)[
        np.minimum(np.arange(WINDOW, len(order) + WINDOW, WINDOW), len(order)) - 1
    ]
    return ends


@lru_cache(maxsize=4)
def _window_rows(epoch: int, window: int, rows: int, group: int, seed: int) -> NDArray[np.int64]:
    groups = _group_order(epoch, rows, group, seed)[window * WINDOW : (window + 1) * WINDOW]
    members = np.concatenate([np.arange(g * group, min((g + 1) * group, rows)) for g in groups])
    return np.random.default_rng([seed, epoch, 1, window]).permutation(members)


def spread(count: int, rows: int) -> NDArray[np.int64]:
    """Indices of `count` of the rows, from the first to near the last at even distances: rows of one document follow
    one another, and documents lie in the order of their names, so the first rows would be of few and like ones."""
    return np.arange(count, dtype=np.int64) * rows // count


def worker_share(indices: NDArray[np.int64], rank: int, workers: int) -> tuple[NDArray[np.int64], int]:
    """The rows of one worker, and how many of them only fill up.

    All workers get equally many, as each step is a collective of all; where they do not divide, the last ones repeat a
    row that is not scored."""
    each = -(-len(indices) // workers)
    own = indices[rank * each : (rank + 1) * each]
    filler = each - len(own)
    return np.concatenate([own, np.repeat(indices[:1], filler)]), filler


def labelled(rows: Rows, filler: int) -> Rows:
    """The rows with `labels` (rows, seq_len), not shifted; of the last `filler` rows none is scored."""
    labels = rows["labels"] if "labels" in rows else rows["input_ids"]
    if filler:
        labels = labels.copy()
        labels[-filler:] = UNSCORED
    return {**rows, "labels": labels}


def scored_tokens(labels: NDArray[np.int32]) -> int:
    """Tokens that are predicted: the first of a row is not."""
    return int((labels[:, 1:] != UNSCORED).sum())


def cut(rows: Rows, size: int) -> Sequence[Rows]:
    """Micro-batches of at most `size` rows."""
    many = len(rows["input_ids"])
    return [{name: column[at : at + size] for name, column in rows.items()} for at in range(0, many, size)]
