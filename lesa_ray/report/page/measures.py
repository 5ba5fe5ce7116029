"""The arithmetic of the page that is not of seeds (`lesa_ray.comparison.statistics`): between points, along a path.

Plain functions on lists, so that each sentence on the page is computed and each is tested.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from statistics import fmean

import numpy as np

_ORDERS = 4799
"""One less than a multiple of 20: with the order that is looked at they are 4,800."""


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x, linear between the points (xs ascending); the nearest end's beyond them."""
    at = bisect_left(xs, x)
    if at == 0 or at == len(xs):
        return ys[min(at, len(xs) - 1)]
    share = (x - xs[at - 1]) / (xs[at] - xs[at - 1])
    return ys[at - 1] + share * (ys[at] - ys[at - 1])


def orderliness(points: Sequence[Sequence[float]]) -> float | None:
    """How much of a path the points are: mean distance of consecutive points over that of all pairs.

    About 1 for points in no order, near 0 for many points along a line; None of fewer than three points, or of
    points that are all in one place."""
    n = len(points)
    pairs = [math.dist(points[i], points[j]) for i in range(n) for j in range(i + 1, n)]
    if n < 3 or not any(pairs):
        return None
    return fmean(math.dist(points[i], points[i + 1]) for i in range(n - 1)) / fmean(pairs)


def orderly_by_chance(points: Sequence[Sequence[float]], family: int = 1) -> float:
    """Below it is the `orderliness` of the points in 5 % / family of all orders, of which it takes some thousand, the
    same each time. There must be an `orderliness`. family: up to 240, so many sets of points are looked at."""
    places = np.asarray(points, dtype=float)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(len(places)), (_ORDERS, 1)), axis=1)
    along = np.sort(distances[orders[:, :-1], orders[:, 1:]].mean(1))
    every = distances.sum() / (len(places) * (len(places) - 1))
    rounding = 1 - 1e-9  # the order itself, and its reverse, are among the orders of a few points
    return float(along[math.floor(0.05 * (_ORDERS + 1) / family) - 1] / every * rounding)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` (two or more) of the indices 0 … count − 1, from the first to the last."""
    return [round(at * (count - 1) / (most - 1)) for at in range(most)] if count > most else list(range(count))


def known(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]
