"""The arithmetic of the page: spreads over seeds, paired differences, costs at equal loss, how orderly a path is.

Plain functions on lists, so that each sentence on the page is computed and each is tested.

How differences are judged. All arms see the same data with the same seed, so two arms are compared seed by seed: the
mean of the differences, with the 95 % interval of Student's t (n − 1 degrees of freedom). With one seed there is no
interval; with two it is ±12.7 standard errors, which hardly anything exceeds. That is as it should be. Of twenty arms
that are equal one is still expected to look different; the page says how many were compared.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Spread:
    """Mean of n values; sd is the sample's standard deviation, None for a single one."""

    mean: float
    sd: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of the differences over common seeds, and half of its 95 % interval (None for a single seed)."""

    mean: float
    half: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half


def spread(values: Sequence[float]) -> Spread | None:
    """None of no value."""
    if not values:
        return None
    sd = stdev(values) if len(values) > 1 else None
    return Spread(fmean(values), sd, min(values), max(values), len(values))


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a − b over the seeds that both have; None if there is none."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not differences:
        return None
    n = len(differences)
    if n == 1:
        return Difference(differences[0], None, 1)
    return Difference(fmean(differences), t975(n - 1) * stdev(differences) / math.sqrt(n), n)


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.2 % (Abramowitz and Stegun 26.7.5 above 15 degrees of freedom)."""
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2


def cost_to_reach(costs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """What was spent when the loss first came down to `level`, linear between evaluations; None if it never did."""
    for at, loss in enumerate(losses):
        if loss <= level:
            if at == 0:
                return costs[0]
            before = losses[at - 1]
            share = (before - level) / (before - loss)
            return costs[at - 1] + share * (costs[at] - costs[at - 1])
    return None


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


def evenly(count: int, most: int) -> list[int]:
    """At most `most` (two or more) of the indices 0 … count − 1, from the first to the last."""
    return [round(at * (count - 1) / (most - 1)) for at in range(most)] if count > most else list(range(count))


def known(values: Sequence[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]
