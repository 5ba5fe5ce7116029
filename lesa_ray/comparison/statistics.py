"""How runs with several seeds are compared: spreads, differences seed by seed, what it costs to come to a loss.

Plain functions on numbers, for the terminal, the page and the studies alike: there is one rule for what is a finding.

The rule. All arms see the same data with the same seed, so two arms are compared seed by seed: the mean of the
differences, with the 95 % interval of Student's t (n − 1 degrees of freedom). It is a finding if the interval leaves
out zero. With one seed there is no interval; with two it is ±12.7 standard errors, which hardly anything exceeds; with
three ±4.3. That is as it should be: of equal arms with three seeds the differences agree in sign in 25 % of all cases,
and their mean is two standard errors from zero in 18 %. Of twenty arms that are equal one still looks different.
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


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a − b over the seeds that both have; None if there is none."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not differences:
        return None
    n = len(differences)
    if n == 1:
        return Difference(differences[0], None, 1)
    return Difference(fmean(differences), t975(n - 1) * stdev(differences) / math.sqrt(n), n)


def unbeaten(mine: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Those of `others` (final losses by seed, by name) that `mine` does not end clearly below."""
    return [name for name, theirs in others.items() if (found := paired(mine, theirs)) is None or not found.below]


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 0.2 % (Abramowitz and Stegun 26.7.5 above 15 degrees of freedom)."""
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2


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
