"""A comparison as figures need it: each arm with its stroke, its numbers by seed, and its mean curve.

Only runs whose training ended count: one that failed or is still to come has no final loss, and its curve would pull
the mean of the others. Bands and means are over the steps at which all of an arm's runs were evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from lesa_ray.comparison.statistics import UNTRAINED, Spread, cost_to_reach, spread, whole
from lesa_ray.report.page.figure import Entry
from lesa_ray.report.page.palette import Stroke, arm_stroke
from lesa_ray.report.page.schema import Arm, Comparison, Evaluation, Trial
from lesa_ray.report.page.words import called

Cost = Literal["tokens", "seconds", "flops"]
COSTS: tuple[Cost, ...] = ("tokens", "seconds", "flops")
AXES = {"tokens": "tokens trained on", "seconds": "training time (s)", "flops": "training compute (FLOP)"}


@dataclass(frozen=True)
class MeanCurve:
    """Over the seeds, at each common step: mean cost; mean, least and largest held-out loss."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class ArmView:
    """An arm and what is known of it, by seed."""

    arm: Arm
    stroke: Stroke
    untrained: bool = False
    """It is the base as it is: one loss, the same for every seed."""
    whole: bool = True
    """No arm has a final loss with a seed with which this one has none."""

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def called(self) -> str:
        """The name as it stands in a sentence."""
        return called(self.arm.name)

    @property
    def complete(self) -> list[Trial]:
        """Runs whose training ended with a loss that is a number."""
        return [trial for trial in self.arm.runs if trial.final_loss is not None]

    @property
    def finals(self) -> dict[int, float]:
        """Final held-out loss by seed."""
        return {trial.seed: trial.final_loss for trial in self.arm.runs if trial.final_loss is not None}

    @property
    def tuned(self) -> dict[int, float]:
        """Held-out loss on conversations after fine-tuning by seed."""
        return {trial.seed: trial.tuned_loss for trial in self.arm.runs if trial.tuned_loss is not None}

    @property
    def before(self) -> dict[int, float]:
        """Held-out loss right after the expansion by seed; also of runs that failed later."""
        return {trial.seed: trial.loss_before for trial in self.arm.runs if trial.loss_before is not None}

    @property
    def final(self) -> Spread | None:
        return spread(list(self.finals.values()))

    def curve(self, trial: Trial, cost: Cost, since: int = 0) -> tuple[list[float], list[float]]:
        """Costs and losses of one run, where both are known; since: from so many tokens on."""
        there = sorted((at for at in trial.curve if (at.tokens or 0) >= since), key=lambda at: at.step)
        points = [(_cost(at, cost), at.loss) for at in there]
        whole = [(x, y) for x, y in points if x is not None and y is not None]
        return [x for x, _ in whole], [y for _, y in whole]

    def spent(self, levels: Mapping[int, float], cost: Cost) -> dict[int, float | None]:
        """What each complete run had spent when it first was at the level of its seed, by seed; None: it never was.

        Seeds without a level, and runs whose cost is not known, are left out."""
        found: dict[int, float | None] = {}
        for trial in self.complete:
            xs, _ = self.curve(trial, cost)
            if trial.seed in levels and xs and xs[-1] > 0:
                xs, losses = self.curve(trial, cost, since=self.arm.inserted_tokens or 0)  # a model with gates is none
                found[trial.seed] = cost_to_reach(xs, losses, levels[trial.seed])
        return found

    def mean_curve(self, cost: Cost) -> MeanCurve | None:
        """None without a step that all complete runs share."""
        runs = [{at.step: at for at in trial.curve if at.loss is not None} for trial in self.complete if trial.curve]
        if not runs:
            return None
        x, mean, low, high = [], [], [], []
        for step in sorted(set.intersection(*(set(run) for run in runs))):
            costs = [_cost(run[step], cost) for run in runs]
            losses = [run[step].loss for run in runs]
            if None in costs:
                continue
            numbers = [loss for loss in losses if loss is not None]
            x.append(fmean(c for c in costs if c is not None))
            mean.append(fmean(numbers))
            low.append(min(numbers))
            high.append(max(numbers))
        return MeanCurve(x, mean, low, high) if x else None


def views(comparison: Comparison) -> list[ArmView]:
    """All arms in their order, methods and controls numbered apart."""
    made: list[ArmView] = []
    counts = {True: 0, False: 0}
    for arm in comparison.arms:
        made.append(ArmView(arm, arm_stroke(counts[arm.control], arm.control)))
        counts[arm.control] += 1
    ended = whole({view.name: view.finals for view in made})
    return [replace(view, whole=view.name in ended) for view in made]


def with_untrained(comparison: Comparison) -> list[ArmView]:
    """All arms, and the untrained base as a control, where its loss is known and an arm has ended."""
    arms, base = views(comparison), comparison.base
    seeds = sorted({seed for view in arms for seed in view.finals})
    if base.loss is None or not seeds:
        return arms
    runs = [Trial(seed=seed, status="complete", final_loss=base.loss) for seed in seeds]
    arm = Arm(name=UNTRAINED, control=True, layers=base.layers, parameters=base.parameters, runs=runs)
    return [*arms, ArmView(arm, arm_stroke(sum(view.arm.control for view in arms), True), untrained=True)]


def ranked(arms: Sequence[ArmView]) -> list[tuple[ArmView, Spread]]:
    """Arms that have a final loss with every seed, the least first."""
    return _in_order(view for view in arms if view.whole)


def unranked(arms: Sequence[ArmView]) -> list[tuple[ArmView, Spread]]:
    """Arms that have a final loss, but lack that of a seed that others have; the least first."""
    return _in_order(view for view in arms if not view.whole)


def _in_order(arms: Iterable[ArmView]) -> list[tuple[ArmView, Spread]]:
    found = [(view, view.final) for view in arms]
    return sorted(((view, final) for view, final in found if final is not None), key=lambda pair: pair[1].mean)


def legend(arms: Sequence[ArmView], *, line: bool = True) -> tuple[Entry, ...]:
    """An entry an arm."""
    return tuple(
        Entry(view.name + (" (control)" if view.arm.control else ""), view.stroke, line=line, mark=True)
        for view in arms
    )


def how_compare(comparison: Comparison) -> str:
    """The command that makes the comparison again."""
    return f"lesa-ray compare {comparison.file or 'FILE'}"


def _cost(at: Evaluation, cost: Cost) -> float | None:
    value: float | None = getattr(at, cost)
    return 0.0 if value is None and at.step == 0 else value
