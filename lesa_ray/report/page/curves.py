"""Held-out loss against tokens, seconds and FLOPs; what each arm needs to reach a loss, and what that saves.

The curves' frame leaves out the first part of a run where an arm starts far above the others: it would press all of
them into one line. Where that cuts something the sentence says so, and the start has a figure of its own.

Cost at equal loss is LESA's headline (arXiv 2502.13794: below LLaMA Pro's final loss after half of its steps). The
reference is the arm that the comparison names, else `llama-pro`, else the best control. Arms are compared seed by seed,
as everywhere: the level is what the reference ended at with the same seed, so with the same rows in the same order. All
runs, the reference's own among them, are asked when they first came down to the level, linear between evaluations; the
reference's answer is 100 %. Its curve may have turned up later: its whole run would make arms like itself look cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.comparison.statistics import spread
from lesa_ray.report.page.compared import AXES, COSTS, ArmView, Cost, MeanCurve, how_compare, legend, ranked
from lesa_ray.report.page.figure import (
    Entry,
    Figure,
    Panel,
    Table,
    plot_line,
    plot_marks,
    rows_axis,
    rows_height,
    short_ticks,
)
from lesa_ray.report.page.measures import evenly, known, value_at
from lesa_ray.report.page.palette import CONTROL, INK, MUTED, SERIES, Stroke
from lesa_ray.report.page.schema import Comparison, Reached
from lesa_ray.report.page.words import big, called, percent, plural, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = 6
"""Panels of tokens to a loss: by default there is a loss for every arm."""
_EARLY = 0.15
"""Share of the budget whose losses do not decide the frame of the curves."""
_END = 2.04
"""Of half a run: where the enlarged second half ends."""
_LEVEL = Stroke(MUTED, "o", (4, 2))
_COST_STROKES = {"tokens": Stroke(INK, "o"), "seconds": Stroke(SERIES[0], "s"), "flops": Stroke(SERIES[1], "^")}


def curves_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """One panel for each kind of cost that is known; bands from the least to the largest of the seeds."""
    curves = {view.name: curve for view in arms if (curve := view.mean_curve("tokens")) is not None}
    if not curves:
        return None
    shown = [view for view in arms if view.name in curves]
    costs = [cost for cost in COSTS if any(view.mean_curve(cost) is not None for view in shown)]
    top = _frame(list(curves.values()))
    cut = [name for name, curve in curves.items() if top is not None and curve.high[0] > top]
    base = comparison.base.loss if top is None or (comparison.base.loss or top) < top else None
    return Figure(
        "held-out-loss",
        "Held-out loss against what was spent: tokens, time, compute",
        _curves_words(shown, curves, cut),
        how_compare(comparison),
        (*(_curve_panel(cost, shown, top, base) for cost in costs), *_end_panel(shown, curves)),
        (*legend(shown), *([Entry("the base, untrained", _LEVEL, mark=False)] if base is not None else [])),
    )


def _frame(curves: list[MeanCurve]) -> float | None:
    """The upper end of the loss axis, where a curve begins above it; None if all of them can be shown."""
    late = [high for one in curves for x, high in zip(one.x, one.high, strict=True) if x >= _EARLY * one.x[-1]]
    low, highest = min(min(one.low) for one in curves), max(one.high[0] for one in curves)
    top = max(late) + 0.06 * (max(late) - low)
    return top if low < top < highest else None


def _curves_words(shown: list[ArmView], curves: dict[str, MeanCurve], cut: list[str]) -> str:
    said = []
    order = ranked(shown)
    if order:
        best = order[0][0].name
        curve = curves[best]
        middle = curve.x[-1] / 2
        level = value_at(curve.x, curve.mean, middle)
        ahead = [
            name for name, one in curves.items() if name != best and one.x[-1] >= middle
            and value_at(one.x, one.mean, middle) < level
        ]  # fmt: skip
        said.append(f"{called(best)} ends lowest, after {big(curve.x[-1])} tokens")
        if ahead:
            said[-1] += f"; half-way {some(ahead)} {'was' if len(ahead) == 1 else 'were'} below it"
    if max(len(view.complete) for view in shown) > 1:
        said.append("lines are means and bands go from the least to the largest of the seeds")
    else:
        said.append("with one seed there are no bands, so lines that are close say nothing")
    said += [
        f"new layers of {view.called} are all in only after {big(view.arm.inserted_tokens)} tokens"
        for view in shown
        if view.arm.inserted_tokens
    ]
    if cut:
        said.append(
            f"{some(cut)} start above the frame" if len(cut) > 1 else f"{called(cut[0])} starts above the frame"
        )
    return "; ".join(said) + "."


def _curve_panel(cost: Cost, shown: list[ArmView], top: float | None, base: float | None) -> Panel:
    def draw(axes: Axes) -> None:
        for view in shown:
            curve = view.mean_curve(cost)
            if curve is not None:
                _draw_curve(axes, view, curve)
        if base is not None:
            axes.axhline(base, color=_LEVEL.colour, dashes=_LEVEL.dashes, linewidth=1, zorder=1)
        if top is not None:
            axes.set_ylim(top=top)
        axes.set_xlim(left=0)
        axes.set_xlabel(AXES[cost])
        axes.set_ylabel("held-out loss (nats a token)")
        short_ticks(axes)

    return Panel(f"by {AXES[cost].split(' (')[0]}", draw, width=4.4, height=2.9)


def _end_panel(shown: list[ArmView], curves: dict[str, MeanCurve]) -> list[Panel]:
    """The second half of the methods' runs, enlarged to the arms that are not far behind; none where there is too
    little to see. A control of equal compute takes more tokens, and would have the second half of its own to itself."""
    half = max(curves[view.name].x[-1] for view in [v for v in shown if not v.arm.control] or shown) / 2
    late = {view.name: [at for at, x in enumerate(curves[view.name].x) if half <= x <= _END * half] for view in shown}
    if max(map(len, late.values())) < 3:
        return []
    lows = sorted(min(curves[name].mean[at] for at in ats) for name, ats in late.items() if ats)
    near = [low for low in lows if low <= lows[0] + 3 * (lows[len(lows) // 2] - lows[0])]
    highs = [
        max(curves[name].high[at] for at in ats)
        for name, ats in late.items()
        if ats and min(curves[name].mean[at] for at in ats) in near
    ]
    bottom = min(curves[name].low[at] for name, ats in late.items() for at in ats)
    if not bottom < max(highs):
        return []
    margin = 0.05 * (max(highs) - bottom)

    def draw(axes: Axes) -> None:
        for view in shown:
            _draw_curve(axes, view, curves[view.name])
        axes.set_xlim(half, _END * half)
        axes.set_ylim(bottom - margin, max(highs) + margin)
        axes.set_xlabel(AXES["tokens"])
        axes.set_ylabel("held-out loss (nats a token)")
        short_ticks(axes)

    return [Panel("by tokens, the second half enlarged", draw, width=4.4, height=2.9)]


def _draw_curve(axes: Axes, view: ArmView, curve: MeanCurve) -> None:
    every = max(1, len(curve.x) // 8)
    if len(view.complete) > 1:
        axes.fill_between(curve.x, curve.low, curve.high, color=view.stroke.colour, alpha=0.16, linewidth=0)
    marked = {"marker": view.stroke.marker, "markevery": (0, every), "markersize": 4}
    plot_line(axes, curve.x, curve.mean, view.stroke, **marked)


def saving_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """Tokens, seconds and FLOPs to the reference's final loss, as shares of what the reference needed."""
    reference = reference_arm(arms, comparison.reference)
    if reference is None or reference.final is None:
        return None
    level = reference.final.mean
    others = [view for view in arms if view is not reference and view.finals]
    shares = {(view.name, cost): _shares(view, reference, cost) for view in others for cost in COSTS}
    shares = {key: found for key, found in shares.items() if found}
    costs = [cost for cost in COSTS if any(key[1] == cost for key in shares)]
    if not shares:
        return None
    tokens = {
        view.name: fmean(share for share in found if share is not None)
        for view in others
        if (found := shares.get((view.name, "tokens"))) and None not in found
    }
    never = [view.name for view in others if view.name not in tokens]
    return Figure(
        "cost-at-equal-loss",
        f"Cost of reaching {reference.called}'s final loss",
        _saving_words(reference, level, tokens, never, most=max(map(len, shares.values()))),
        how_compare(comparison),
        (_saving_panel(others, costs, shares, reference.name),),
        (
            *(Entry(AXES[cost].split(" (")[0], _COST_STROKES[cost], line=False) for cost in costs),
            Entry("not reached by every seed", Stroke(MUTED, ">"), line=False, filled=False),
        ),
        Table(
            ("arm", *(AXES[cost].split(" (")[0] for cost in costs)),
            tuple((view.name, *(_share_cell(shares.get((view.name, cost))) for cost in costs)) for view in others),
        ),
    )


def reference_arm(arms: list[ArmView], named: str | None) -> ArmView | None:
    """The arm that the comparison names, else `llama-pro`, which the paper compares with, else the best control; None
    if none of them has a result."""
    known = [view for view, _ in ranked(arms)]
    own = [view for view in arms if view.name == named and view.finals]
    pro = [view for view in known if view.arm.method == "llama-pro" and not view.arm.control]
    controls = [view for view in known if view.arm.control]
    return next(iter([*own, *pro, *controls]), None)


def _shares(view: ArmView, reference: ArmView, cost: Cost) -> list[float | None]:
    """For each seed that both have the share of what the reference needed; None for one that did not get there. Seeds
    are left out with which the reference needed nothing: it ended no lower than it began."""
    own, spent = (one.spent(reference.finals, cost) for one in (reference, view))
    return [None if found is None else found / needed for seed, found in spent.items() if (needed := own.get(seed))]


def _saving_words(reference: ArmView, level: float, tokens: dict[str, float], never: list[str], *, most: int) -> str:
    """most: so many seeds have the reference and an arm in common at most."""
    start = f"{reference.called} ends at {level:.4f}" + (" in the mean" if len(reference.finals) > 1 else "")
    if not tokens:
        return f"{start}; no other arm reached that with every seed."
    name = min(tokens, key=lambda key: tokens[key])
    share = tokens[name]
    first = f"{start}; {called(name)} is there with {percent(share)} of its tokens"
    if share > 1:
        first = f"{start}; no other arm is there with fewer tokens, the nearest is {called(name)} with {percent(share)}"
    rest = f"; not reached by every seed of {some(never)}" if never else ""
    rest += "; with one seed, whether another would say the same is not known" if most == 1 else ""
    return f"{first} (LESA's paper: LESA is below LLaMA Pro's final perplexity with half of its steps){rest}."


def _share_cell(found: list[float | None] | None) -> str:
    if not found:
        return "not measured"
    reached = [share for share in found if share is not None]
    if len(reached) < len(found):
        return f"reached by {len(reached)} of {len(found)}"
    value = spread(reached)
    assert value is not None
    return percent(value.mean) + ("" if value.sd is None else f" (SD {100 * value.sd:.0f} %)")


def _saving_panel(
    others: list[ArmView], costs: list[Cost], shares: dict[tuple[str, Cost], list[float | None]], reference: str
) -> Panel:
    reached = [share for found in shares.values() for share in found if share is not None]
    edge = 1.08 * max([1.0, *reached])

    def draw(axes: Axes) -> None:
        rows_axis(axes, [view.name for view in others])
        axes.grid(axis="y", visible=False)
        for at, view in enumerate(others):
            for number, cost in enumerate(costs):
                found = shares.get((view.name, cost))
                if not found:
                    continue
                y = at + (number - (len(costs) - 1) / 2) * 0.24
                values = [share for share in found if share is not None]
                stroke = _COST_STROKES[cost]
                if len(values) < len(found):
                    plot_marks(axes, [100 * edge], [y], Stroke(stroke.colour, ">"), filled=False, clip_on=False)
                    continue
                if len(values) > 1:
                    ends = [100 * min(values), 100 * max(values)]
                    axes.plot(ends, [y, y], color=stroke.colour, linewidth=2, alpha=0.45)
                plot_marks(axes, [100 * fmean(values)], [y], stroke)
        axes.axvline(100, color=CONTROL, linewidth=1, dashes=(4, 2))
        axes.set_xlim(0, 100 * edge)
        axes.set_xlabel(f"% of what {reference} needed")

    return Panel("", draw, width=4.6, height=rows_height([view.name for view in others]) + 0.1)


def reached_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """Tokens to each of the levels that the comparison lists: a loss, or what the runs of an arm ended at."""
    finals, seeds = {view.name: view.finals for view in arms}, {seed for view in arms for seed in view.finals}
    levels = []
    for one in sorted(comparison.reached, key=lambda one: -one.loss):
        level = dict.fromkeys(seeds, one.loss) if one.of is None else finals.get(one.of, {})
        row = {view.name: list(spent.values()) for view in arms if (spent := view.spent(level, "tokens"))}
        if any(value is not None for values in row.values() for value in values):
            levels.append((_level_words(one, level), one.of, row))
    if not levels:
        return None
    all_levels = len(levels)
    levels = [levels[at] for at in evenly(all_levels, _LEVELS)]
    see = "No arm comes to one of these losses with every seed, but those that ended there."
    for words, of, row in reversed(levels):
        whole = {name: fmean(there) for name, values in row.items() if len(there := known(values)) == len(values)}
        if first := sorted(whole.keys() - {of}, key=whole.__getitem__)[:1]:
            rest = len(row) - len(whole)
            see = f"First at {words} is {called(first[0])}, after {big(whole[first[0]])} tokens"
            see += f"; {plural(rest, 'arm')} did not come there with every seed." if rest else "."
            break
    if all_levels > len(levels):
        see += f" {len(levels)} of {all_levels} losses are shown."
    there = [value for _, _, row in levels for values in row.values() for value in known(values)]
    end = max([comparison.tokens or 0, *there])
    shown = [view for view in arms if any(view.name in row for _, _, row in levels)]
    return Figure(
        "tokens-to-loss",
        "Tokens to reach a loss",
        see,
        how_compare(comparison),
        tuple(_reached_panel(words, row, shown, end) for words, _, row in levels),
        (
            Entry("mean over seeds", Stroke(INK, "o"), line=False),
            Entry("not reached by every seed", Stroke(MUTED, ">"), line=False, filled=False),
        ),
    )


def _level_words(one: Reached, level: Mapping[int, float]) -> str:
    """What is to be reached."""
    if one.of is None or not level:
        return f"a loss of {one.loss:.4f}"
    mean = f"{fmean(level.values()):.4f}" + (" in the mean" if len(level) > 1 else "")
    return f"what {called(one.of)} ended at with the same seed ({mean})"


def _reached_panel(title: str, row: dict[str, list[float | None]], shown: list[ArmView], end: float) -> Panel:
    edge = 1.06 * end

    def draw(axes: Axes) -> None:
        rows_axis(axes, [view.name for view in shown], wrap=16)
        axes.grid(axis="y", visible=False)
        for at, view in enumerate(shown):
            values = row.get(view.name, [])
            there = known(values)
            if len(there) < len(values):  # a mean of those that got there would be of the easier seeds
                plot_marks(axes, [edge], [at], Stroke(view.stroke.colour, ">"), filled=False, clip_on=False)
            elif there:
                plot_marks(axes, [fmean(there)], [at], view.stroke)
                axes.plot([min(there), max(there)], [at, at], color=view.stroke.colour, linewidth=2, alpha=0.45)
        axes.set_xlim(0, edge)
        short_ticks(axes)
        axes.set_xlabel("tokens trained on")

    return Panel(title, draw, height=rows_height([view.name for view in shown], wrap=16) + 0.15)
