"""How runs with several seeds are compared: spreads, differences seed by seed, what it costs to come to a loss.

Plain functions on numbers, for the terminal, the page and the studies alike: there is one rule for what is a finding.

The rule. All arms see the same data with the same seed, so two arms are compared seed by seed: the mean of the
differences, with the 95 % interval of Student's t (n − 1 degrees of freedom). It is a finding if the interval leaves
out zero. With one seed there is no interval; with two it is ±12.7 standard errors, which hardly anything exceeds; with
three ±4.3. That is as it should be: of equal arms with three seeds the differences agree in sign in 25 % of all cases,
and their mean is two standard errors from zero in 18 %.

The best arm is one that was picked, and a picked one looks better than it is: of twenty equal arms with three seeds
such intervals set at least one apart from the best in 79 % of all studies. Whichever is picked, it is one of
k (k − 1) / 2 pairs, so beside the best of k arms the interval is as wide as Bonferroni has it for all pairs; then it is
less than 5 %, whatever the arms' spreads. (For the k − 1 others alone it would be 11 %, and 18 % with ten seeds.) With
twenty arms that is ±62 standard errors with three seeds, ±12 with five.

An arm that lost a seed is not ranked: the mean of the seeds that it has left is of easier or harder data, and a run
that diverged would do its arm good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

UNTRAINED = "base, untrained"
"""The base as it is: a control without any training. Its held-out loss has no seed, so beside the finals of an arm it
counts as the same for all of them."""


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

    @property
    def below(self) -> bool:
        """Whether it is clear, and less than zero: of losses, better."""
        return self.clear and self.mean < 0


def spread(values: Sequence[float]) -> Spread | None:
    """None of no value."""
    if not values:
        return None
    sd = stdev(values) if len(values) > 1 else None
    return Spread(fmean(values), sd, min(values), max(values), len(values))


def paired(a: Mapping[int, float], b: Mapping[int, float], family: int = 1) -> Difference | None:
    """a − b over the seeds that both have; None if there is none. family: so many intervals are to hold together.
    Whatever else is measured twice may take the place of seeds."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not differences:
        return None
    n = len(differences)
    if n == 1:
        return Difference(differences[0], None, 1)
    return Difference(fmean(differences), quantile(n - 1, family) * stdev(differences) / math.sqrt(n), n)


def unbeaten(mine: Mapping[int, float], others: Mapping[str, Mapping[int, float]], family: int = 1) -> list[str]:
    """Those of `others` (final losses by seed, by name) that `mine` does not end clearly below."""
    found = {name: paired(mine, theirs, family) for name, theirs in others.items()}
    return [name for name, difference in found.items() if difference is None or not difference.below]


def pairs(arms: int) -> int:
    """The `family` of differences to the best of so many arms."""
    return max(1, arms * (arms - 1) // 2)


def whole(losses: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Arms that have a final loss with every seed with which any has one. losses: by seed, by arm."""
    seeds = {seed for mine in losses.values() for seed in mine}
    return [name for name, mine in losses.items() if mine and mine.keys() >= seeds]


def quantile(freedom: int, family: int = 1) -> float:
    """Student's t beyond which, on either side, 5 % / family of all values lie."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t/√freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, freedom) > 0.05 / family else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _beyond(angle: float, freedom: int) -> float:
    """The share of Student's t that is beyond ±√freedom·tan(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (step - 1) / step
    total *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + total) if odd else total)


def finals(arm: Mapping[str, Any]) -> dict[int, float]:
    """Final held-out losses by seed. arm: of the content of a `comparison.json`."""
    return {run["seed"]: run["final_loss"] for run in arm["runs"] if run["final_loss"] is not None}


def untrained(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The base as it is, as one arm more: its loss for each seed with which an arm ended. Empty where none has, or the
    loss is not known. content: of a `comparison.json`."""
    loss, seeds = content["base"]["loss"], {seed for arm in content["arms"] for seed in finals(arm)}
    if loss is None or not seeds:
        return []
    runs = [{"seed": seed, "final_loss": loss, "loss_before": loss} for seed in sorted(seeds)]
    return [{"name": UNTRAINED, "control": True, "runs": runs}]


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
