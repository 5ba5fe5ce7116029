"""The losses of the arms' runs, at the end of training and right after the expansion, drawn arm by arm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lesa_ray.comparison.statistics import Spread, paired, pairs
from lesa_ray.report.page.compared import ArmView, how_compare, ranked, unranked
from lesa_ray.report.page.figure import Entry, Figure, Panel, Table, plot_marks, rows_axis, rows_height
from lesa_ray.report.page.palette import CONTROL, INK, MUTED, Stroke
from lesa_ray.report.page.schema import Comparison
from lesa_ray.report.page.words import called, plural, signed, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NARROW = 0.01
"""Least width of an axis of losses, in nats."""
_FAR = 10
"""An arm that is so many times as far from the best as all before it is beyond the axis, which would else show it and
nothing more."""
_BASE_LINE = Stroke(MUTED, "o", (4, 2))


def final_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """Every run's final loss, and the mean of each arm; those that lack a seed come last."""
    order = ranked(arms)
    every = [*order, *unranked(arms)]
    if not every:
        return None
    rows = [(view, [final.mean] if view.untrained else list(view.finals.values())) for view, final in every]
    return Figure(
        "final-loss",
        "Held-out loss at the end of training",
        _final_words(order),
        how_compare(comparison),
        (
            _rows_panel("held-out loss (nats a token)", rows, None, framed=True),
            *_differences(arms, [view for view, _ in rows]),
        ),
        _rows_legend(None, rows),
        Table(
            ("arm", "mean", "standard deviation", "seeds"),
            tuple(
                (view.name, f"{f.mean:.4f}", *(("–", "–") if view.untrained else (_sd(f), str(f.n))))
                for view, f in every
            ),
        ),
    )


def _final_words(order: list[tuple[ArmView, Spread]]) -> str:
    """order: of those that are ranked."""
    if not order:
        return "No arm has a final loss with every seed that others have, so there is no best one yet."
    (best, first), gaps = order[0], order[-1][1].mean - order[0][1].mean
    if len(order) == 1:
        return f"Only {best.called} has a final loss with every seed, {first.mean:.4f}."
    if first.n == 1:
        return (
            f"From the best arm to the worst it is {gaps:.4f}; with one seed each, how much of that is chance is open."
        )
    widest = max(final.high - final.low for _, final in order)
    return (
        f"From the best arm's mean to the worst's it is {gaps:.4f}; the {plural(first.n, 'seed')} of one arm lie up to "
        f"{widest:.4f} apart. A difference between arms counts where its interval, seed by seed, leaves out zero."
    )


def _sd(found: Spread) -> str:
    return "–" if found.sd is None else f"{found.sd:.4f}"


def _differences(arms: list[ArmView], rows: list[ArmView]) -> list[Panel]:
    """A panel of each arm's differences to the best control (the best arm, where there is none), seed by seed."""
    order, controls = ranked(arms), ranked([view for view in arms if view.arm.control])
    if not order:
        return []
    to, family = (controls[0][0], 1) if controls else (order[0][0], pairs(len(order)))
    found = {view.name: paired(view.finals, to.finals, family) for view in rows if view is not to}
    means = [abs(one.mean) for one in found.values() if one is not None]
    if not means or max(means) == 0:
        return []
    limit = 1.6 * _framed([0.0, *means])

    def draw(axes: Axes) -> None:
        rows_axis(axes, [view.name for view in rows])
        axes.grid(axis="y", visible=False)
        axes.axvline(0, color=INK, linewidth=1)
        more = ""
        for at, view in enumerate(rows):
            one = found.get(view.name)
            if one is None:
                continue
            ends = [one.mean - (one.half or 0.0), one.mean + (one.half or 0.0)]
            axes.plot(ends, [at, at], color=view.stroke.colour, linewidth=2.4, alpha=0.45)
            for end, marker in zip(ends, "<>", strict=True):
                if abs(end) > limit:
                    more = "; ◂ ▸: goes on"
                    if abs(one.mean) <= limit or end * one.mean < 0:
                        edge = math.copysign(limit, end)
                        axes.plot([edge], [at], marker, color=view.stroke.colour, markersize=5, clip_on=False)
            if abs(one.mean) > limit:
                _beyond(axes, math.copysign(limit, one.mean), at, signed(one.mean, 3), view.stroke, filled=one.clear)
            else:
                plot_marks(axes, [one.mean], [at], view.stroke, filled=one.clear, markersize=6)
        axes.set_xlim(-limit, limit)
        axes.set_xlabel(f"difference of final losses, 95 % interval\n(filled: leaves out 0{more})")
        axes.locator_params(axis="x", nbins=5)

    return [Panel(f"against {to.called}", draw, width=4.6, height=rows_height([view.name for view in rows]) + 0.15)]


def before_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """The loss right after expansion, beside the base's."""
    found = [(view, list(view.before.values())) for view in arms if view.before]
    if not found:
        return None
    rows = sorted(found, key=lambda row: sum(row[1]) / len(row[1]))
    base = comparison.base.loss
    if base is None:
        high, low = rows[-1], rows[0]
        see = (
            f"Training starts lowest with {low[0].called} ({_mean(low[1]):.4f}) and highest with {high[0].called} "
            f"({_mean(high[1]):.4f}); the base's own loss was not measured."
        )
    else:
        gaps = {view.name: _mean(losses) - base for view, losses in rows}
        kept = [name for name, gap in gaps.items() if abs(gap) < 5e-5 * max(1, abs(base))]
        furthest = max(gaps, key=lambda name: abs(gaps[name]))
        see = f"No arm starts exactly at the base's {base:.4f}"
        if kept:
            see = f"{some(kept)} {'start' if len(kept) > 1 else 'starts'} where the base is ({base:.4f})"
        if len(kept) < len(gaps):
            see += f"; the furthest from it is {called(furthest)}, {signed(gaps[furthest])}"
        see += "."
    if shut := [view.name for view, _ in rows if view.arm.inserted_tokens]:
        see += f" New layers of {some(shut)} come in during training, and are not yet in here."
    return Figure(
        "loss-after-expansion",
        "Held-out loss right after expansion, before any training",
        see,
        how_compare(comparison),
        (_rows_panel("held-out loss (nats a token)", rows, base),),
        _rows_legend(base, rows),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _framed(distances: list[float]) -> float:
    """Of distances to the best, the largest that an axis has room for; half of the arms at least."""
    found = sorted(distances)
    for at in range(max(2, math.ceil(len(found) / 2)), len(found)):
        if found[at] > _FAR * max(found[at - 1], _NARROW / 2):
            return found[at - 1]
    return found[-1]


def _beyond(axes: Axes, edge: float, at: int, value: str, stroke: Stroke, *, filled: bool = True) -> None:
    """What lies beyond an edge of the axis: a mark there, and its value beside it."""
    right = edge > 0
    mark = Stroke(stroke.colour, ">" if right else "<")
    plot_marks(axes, [edge], [at], mark, filled=filled, markersize=6, clip_on=False)
    axes.annotate(
        value,
        (edge, at),
        xytext=(-6 if right else 6, 2),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        color=INK,
        fontsize=7.5,
    )


def _rows_panel(
    label: str, rows: list[tuple[ArmView, list[float]]], base: float | None, *, framed: bool = False
) -> Panel:
    """A row an arm: its runs as open markers, their mean as a filled one with a bar from the least to the largest.

    framed: the axis is that of the arms near the best, and the others are at its edge."""
    means = [_mean(values) for _, values in rows]
    reach = min(means) + _framed([mean - min(means) for mean in means]) if framed else math.inf
    cut = max(means) > reach

    def draw(axes: Axes) -> None:
        rows_axis(axes, [view.name for view, _ in rows])
        axes.grid(axis="y", visible=False)
        for at, (view, values) in enumerate(rows):
            if len(values) > 1:
                axes.plot([min(values), max(values)], [at, at], color=view.stroke.colour, linewidth=2.4, alpha=0.45)
                plot_marks(axes, values, [at] * len(values), view.stroke, filled=False, markersize=4)
            if means[at] <= reach:
                plot_marks(axes, [means[at]], [at], view.stroke, markersize=7)
        if base is not None:
            axes.axvline(base, color=_BASE_LINE.colour, dashes=_BASE_LINE.dashes, linewidth=1.2, zorder=1)
        axes.set_xlabel(f"{label}\n(▸: the mean is beyond)" if cut else label)
        axes.margins(x=0.08)
        if cut:
            low = min(min(values) for _, values in rows)
            high = max(max(values) for (_, values), mean in zip(rows, means, strict=True) if mean <= reach)
            axes.set_xlim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        low, high = axes.get_xlim()
        if high - low < _NARROW:  # what is alike should look alike
            axes.set_xlim((low + high - _NARROW) / 2, (low + high + _NARROW) / 2)
        axes.locator_params(axis="x", nbins=5)
        for at, (view, _) in enumerate(rows):
            if means[at] > reach:
                _beyond(axes, axes.get_xlim()[1], at, f"{means[at]:.3f}", view.stroke)

    return Panel("each run", draw, width=4.6, height=rows_height([view.name for view, _ in rows]) + 0.15 * cut)


def _rows_legend(base: float | None, rows: list[tuple[ArmView, list[float]]]) -> tuple[Entry, ...]:
    several = any(len(values) > 1 for _, values in rows)
    entries = [Entry("mean over seeds" if several else "one seed", Stroke(INK, "o"), line=False)]
    if several:
        entries.append(Entry("one seed", Stroke(INK, "o"), line=False, filled=False))
    if any(view.arm.control for view, _ in rows):
        entries.append(Entry("grey: controls", Stroke(CONTROL, "s"), line=False))
    if base is not None:
        entries.append(Entry("the base, untrained", _BASE_LINE, mark=False))
    return tuple(entries)
