"""Downstream tasks of a comparison, and what the papers published for the same base and growth."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.comparison.statistics import paired, whole
from lesa_ray.report.page.compared import ArmView, how_compare
from lesa_ray.report.page.figure import Entry, Figure, Panel, Table, plot_marks, rows_axis, rows_height
from lesa_ray.report.page.palette import INK, MUTED, Stroke
from lesa_ray.report.page.schema import Comparison
from lesa_ray.report.page.words import called, listed, plural, some
from lesa_ray.report.published import TASKS, Published, matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 12
_BASE = Stroke(MUTED, "o", (4, 2))
_FALLING = ("perplexity", "wikitext", "bits_per_byte", "loss")
"""Words in the names of metrics, or of tasks whose metric is not known, that are better when lower."""


def task_values(view: ArmView) -> dict[str, dict[int, float]]:
    """Values by task and seed."""
    found: dict[str, dict[int, float]] = {}
    for trial in view.complete:
        for name, value in (trial.tasks or {}).items():
            if value is not None:
                found.setdefault(name, {})[trial.seed] = value
    return found


def tasks_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """A panel a task, a row an arm."""
    values = {view.name: found for view in arms if (found := task_values(view))}
    names = list(dict.fromkeys(name for found in values.values() for name in found))
    if not names:
        return None
    shown = [view for view in arms if view.name in values]
    wins: dict[str, list[bool]] = {}
    for name in names:
        scores = {arm: found[name] for arm, found in values.items() if name in found}
        scores = {arm: scores[arm] for arm in whole(scores)}
        if not scores:
            continue
        pick = min if _falls(comparison, name) else max
        best = pick(scores, key=lambda arm: fmean(scores[arm].values()))
        rest = [paired(scores[best], theirs) for arm, theirs in scores.items() if arm != best]
        wins.setdefault(best, []).append(all(found is not None and found.clear for found in rest))
    see = "No arm was measured with every seed that others have"
    if wins:
        first = max(wins, key=lambda arm: len(wins[arm]))
        seeds = max(len(v) for found in values.values() for v in found.values())
        see = f"{called(first)} has the best mean in {len(wins[first])} of {plural(len(names), 'task')}"
        see += (
            "; with one seed that is no finding"
            if seeds == 1
            else f", told apart from all others in {sum(wins[first])}"
        )
    base = {name: value for name, value in (comparison.base.tasks or {}).items() if value is not None}
    if _tuned(comparison):
        see += f"; all were fine-tuned before{', but for the untrained base' if base else ''}"
    more = f"; {len(names) - _MOST} more tasks are in the table only" if len(names) > _MOST else ""
    lines = {name: published_lines(comparison, arms, name) for name in names}
    return Figure(
        "tasks",
        "Downstream tasks",
        f"{see}{more}.",
        how_compare(comparison),
        tuple(
            _task_panel(name, _axis_words(comparison, name), shown, values, lines[name], base.get(name))
            for name in names[:_MOST]
        ),
        (
            Entry("mean over seeds", Stroke(INK, "o"), line=False),
            *([Entry("the base, untrained", _BASE, mark=False)] if base else []),
            *(
                [Entry("published (see below)", Stroke(MUTED, "D"), line=False, filled=False)]
                if any(lines.values())
                else []
            ),
        ),
        Table(
            ("arm", *names),
            tuple((view.name, *(_mean(values[view.name].get(name)) for name in names)) for view in shown),
        ),
    )


def _mean(found: dict[int, float] | None) -> str:
    return f"{fmean(found.values()):.4g}" if found else "–"


def _falls(comparison: Comparison, task: str) -> bool:
    """Whether lower is better."""
    known = comparison.task_metrics.get(task)
    if known is not None and known.higher_is_better is not None:
        return not known.higher_is_better
    return any(word in (task if known is None else known.metric) for word in _FALLING)


def _axis_words(comparison: Comparison, task: str) -> str:
    falls, known = _falls(comparison, task), comparison.task_metrics.get(task)
    metric = known.metric if known is not None else "perplexity" if falls else "score"
    return f"{metric} ({'lower' if falls else 'higher'} is better)"


def published_lines(comparison: Comparison, arms: list[ArmView], task: str) -> dict[str, float]:
    """What was published for this task by method, of models tuned like these: only wikitext's word perplexity is given
    task by task."""
    if not _is_wikitext(comparison, task):
        return {}
    tables = [one for one in published_for(comparison, arms)
              if one.columns[0].startswith("wikitext") and one.tuned == _tuned(comparison)]  # fmt: skip
    return {m: row[0] for m, row in tables[0].rows.items() if row[0] is not None} if tables else {}


def _tuned(comparison: Comparison) -> bool:
    """Whether the models were fine-tuned before they were measured."""
    return bool(comparison.settings.get("finetune"))


def _is_wikitext(comparison: Comparison, task: str) -> bool:
    """Whether a task's figures are what was published: the word perplexity of wikitext."""
    known = comparison.task_metrics.get(task)
    return "wikitext" in task and (known is None or known.metric == "word_perplexity")


def _task_panel(
    name: str,
    label: str,
    shown: list[ArmView],
    values: dict[str, dict[str, dict[int, float]]],
    lines: dict[str, float],
    base: float | None,
) -> Panel:
    def draw(axes: Axes) -> None:
        rows_axis(axes, [view.name for view in shown], wrap=16)
        axes.grid(axis="y", visible=False)
        for at, view in enumerate(shown):
            found = list(values[view.name].get(name, {}).values())
            if found:
                axes.plot([min(found), max(found)], [at, at], color=view.stroke.colour, linewidth=2, alpha=0.45)
                plot_marks(axes, [fmean(found)], [at], view.stroke)
            if view.arm.method in lines:
                plot_marks(axes, [lines[view.arm.method]], [at], Stroke(MUTED, "D"), filled=False, markersize=6)
        if base is not None:
            axes.axvline(base, color=_BASE.colour, dashes=_BASE.dashes, linewidth=1.2, zorder=1)
        axes.margins(x=0.1)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(label)

    return Panel(name, draw, height=rows_height([view.name for view in shown], wrap=16))


def published_for(comparison: Comparison, arms: list[ArmView]) -> list[Published]:
    """The published tables whose base and growth are this comparison's."""
    base = comparison.base
    grown = {view.arm.layers for view in arms if view.arm.layers is not None}
    return matching(base.family, base.layers, base.parameters, grown)


def published_figure(comparison: Comparison, arms: list[ArmView]) -> Figure | None:
    """The papers' figures for this base and growth, and this study's where it measured the same task."""
    tables = published_for(comparison, arms)
    if not tables:
        return None
    ours = {table.title: [_ours(table, column, comparison, arms) for column in table.columns] for table in tables}
    measured = sorted({column for t in tables for column, found in zip(t.columns, ours[t.title], strict=True) if found})
    see = "This study has the base and the growth of " + listed(
        sorted({table.source.split(",")[0] for table in tables})
    )
    if measured:
        see += f"; filled marks are its own figures ({some(measured)}), open ones the papers'. "
        see += "Values compare only where data, tokens and evaluation are the same."
    else:
        see += "; it measured none of the papers' tasks, so only its order of methods can be compared with theirs."
    panels = tuple(
        _published_panel(table, number, ours[table.title][number])
        for table in tables
        for number in range(len(table.columns))
    )
    return Figure(
        "published",
        "What the papers published for this base and growth",
        see,
        how_compare(comparison),
        panels,
        (
            Entry("published", Stroke(MUTED, "D"), line=False, filled=False),
            *([Entry("this study", Stroke(INK, "o"), line=False)] if measured else []),
        ),
        Table(
            ("published", "method", "figures"),
            tuple(
                (
                    f"{table.title} ({table.source})",
                    method,
                    "; ".join(
                        f"{column}: {value:g}"
                        for column, value in zip(table.columns, row, strict=True)
                        if value is not None
                    ),
                )
                for table in tables
                for method, row in table.rows.items()
            ),
        ),
    )


def _ours(table: Published, column: str, comparison: Comparison, arms: list[ArmView]) -> dict[str, float]:
    """This study's figure for a column, by method; empty where it did not measure all that the column is made of, or
    measured models that were fine-tuned beside published ones that were not."""
    if table.tuned != _tuned(comparison):
        return {}
    measured: dict[str, dict[str, float]] = {}
    if not table.tuned:
        measured["base"] = {name: value for name, value in (comparison.base.tasks or {}).items() if value is not None}
    for view in arms:
        if view.arm.method is not None and view.arm.layers == table.layers and not view.arm.control:
            means = {name: fmean(values.values()) for name, values in task_values(view).items()}
            measured.setdefault(view.arm.method, means)
    found = {method: _column(comparison, column, means) for method, means in measured.items() if method in table.rows}
    return {method: value for method, value in found.items() if value is not None}


def _column(comparison: Comparison, column: str, means: dict[str, float]) -> float | None:
    """The value of a published column from this study's tasks; None if one of them is missing."""
    if column.startswith("wikitext"):
        return next((value for name, value in means.items() if _is_wikitext(comparison, name)), None)
    if not column.startswith("mean of 7"):
        return None
    values = [next((v for name, v in means.items() if name.split("/")[0] == task), None) for task in TASKS]
    whole = [value for value in values if value is not None]
    if len(whole) < len(TASKS):
        return None
    return fmean(whole) * (100 if all(0 <= value <= 1 for value in whole) else 1)


def _published_panel(table: Published, number: int, ours: dict[str, float]) -> Panel:
    rows = [(method, row[number]) for method, row in table.rows.items()]

    def draw(axes: Axes) -> None:
        rows_axis(axes, [method for method, _ in rows])
        axes.grid(axis="y", visible=False)
        for at, (method, value) in enumerate(rows):
            if value is not None:
                plot_marks(axes, [value], [at], Stroke(MUTED, "D"), filled=False, markersize=6)
            if method in ours:
                plot_marks(axes, [ours[method]], [at], Stroke(INK, "o"))
        axes.margins(x=0.1)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(table.columns[number])

    return Panel(table.title, draw, height=rows_height([method for method, _ in rows]) + 0.25)
