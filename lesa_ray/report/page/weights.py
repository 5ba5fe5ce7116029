"""What the weights look like, layer by layer: what the figures of weights share, and the norms.

Small multiples: a panel for each weight type, all alike, so that the eye compares them. Old layers are coloured by
depth where each has a line of its own; new layers are always diamonds in their own colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.report.page.commands import command
from lesa_ray.report.page.figure import (
    Entry,
    Figure,
    Panel,
    layer_axis,
    plot_line,
    plot_marks,
)
from lesa_ray.report.page.measures import known
from lesa_ray.report.page.palette import MARKERS, NEW, RAMP, SERIES, Stroke
from lesa_ray.report.page.schema import Analysis, TypeFigures
from lesa_ray.report.page.words import short_type, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TYPES = 12
"""Panels of a figure; experts make hundreds of types. The first ones are shown, and the page says so."""
_WHERE = ("device", "memory_budget", "gpus_per_task", "cpus_per_task")
"""Settings of the machine, not of what is measured."""
_OLD, _NEW = Stroke(SERIES[0], "o"), Stroke(NEW, "D")
OLD_ENTRY, NEW_ENTRY = Entry("old layer", _OLD, line=False), Entry("new layer", _NEW, line=False, filled=False)
PANEL_HEIGHT = 2.35


def shown_types(analysis: Analysis) -> dict[str, TypeFigures]:
    """The weight types that have panels."""
    return dict(list(analysis.types.items())[:MOST_TYPES])


def depth_entries(analysis: Analysis) -> tuple[Entry, ...]:
    """A legend of the ramp over depth, and of new layers where there are some."""
    steps = [(0, "first layer"), (len(RAMP) // 2, "middle"), (len(RAMP) - 1, "last layer")]
    entries = [Entry(text, Stroke(RAMP[at], "o"), line=True, mark=False) for at, text in steps]
    return (*entries, Entry("new layer", _NEW, filled=False)) if analysis.new_layers else tuple(entries)


def type_strokes(types: Sequence[str]) -> dict[str, Stroke]:
    """A stroke for each weight type, where all are in one panel."""
    most = len(SERIES)
    return {
        t: Stroke(SERIES[i % most], MARKERS[i % len(MARKERS)], (4, 2) if i >= most else ()) for i, t in enumerate(types)
    }


def how_analyze(analysis: Analysis) -> str:
    """The command that measures it again."""
    data = [analysis.residual.data] if analysis.residual and analysis.residual.data else []
    settings = {"data": data, **analysis.settings, "out": "FOLDER"}
    return command(["lesa-ray", "analyze", analysis.checkpoint], AnalyzeConfig, settings, {"base", "page", *_WHERE})


def norms_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """Frobenius norm of each layer; new ones beside the old."""
    types = {t: f for t, f in shown_types(analysis).items() if known(f.norms)}
    if not types:
        return None
    return Figure(
        name,
        f"Frobenius norm of each layer's weights: {label}",
        _norm_words(analysis, types),
        how_analyze(analysis),
        tuple(_layers_panel(short_type(t), f.norms, analysis, "Frobenius norm") for t, f in types.items()),
        (OLD_ENTRY, NEW_ENTRY) if analysis.new_layers else (OLD_ENTRY,),
    )


def norm_ratios(figures: TypeFigures, new_layers: Sequence[int]) -> list[float]:
    """For each new layer its norm over the mean of the nearest old layers below and above."""
    new = set(new_layers)
    old = {i: norm for i, norm in enumerate(figures.norms) if i not in new and norm}
    ratios = []
    for at in new_layers:
        norm = figures.norms[at] if at < len(figures.norms) else None
        below, above = [i for i in old if i < at], [i for i in old if i > at]
        beside = [old[i] for i in (max(below, default=None), min(above, default=None)) if i is not None]
        if norm is not None and beside:
            ratios.append(norm / fmean(beside))
    return ratios


def _norm_words(analysis: Analysis, types: dict[str, TypeFigures]) -> str:
    if not analysis.new_layers:
        growth = {
            t: values[-1] / values[0] for t, f in types.items() if len(values := known(f.norms)) > 1 and values[0]
        }
        if not growth:
            return "There is one layer, so norms do not change over depth."
        most = max(growth, key=lambda t: growth[t])
        least = min(growth, key=lambda t: growth[t])
        return (
            f"From the first layer to the last the norm changes most upward for {short_type(most)} "
            f"(× {growth[most]:.2f}) and least for {short_type(least)} (× {growth[least]:.2f})."
        )
    ratios = {t: fmean(found) for t, f in types.items() if (found := norm_ratios(f, analysis.new_layers))}
    if not ratios:
        return "The norms of the new layers are not known."
    low, high = min(ratios, key=lambda t: ratios[t]), max(ratios, key=lambda t: ratios[t])
    zero = [short_type(t) for t, ratio in ratios.items() if ratio == 0]
    said = (
        f"New layers have {ratios[low]:.2f} ({short_type(low)}) to {ratios[high]:.2f} ({short_type(high)}) times the "
        "norm of the old ones beside them"
    )
    return (
        f"{said}; {some(zero)} {'is' if len(zero) == 1 else 'are'} zero, so they write nothing yet."
        if zero
        else f"{said}."
    )


def _layers_panel(title: str, values: Sequence[float | None], analysis: Analysis, label: str) -> Panel:
    def draw(axes: Axes) -> None:
        new = set(analysis.new_layers)
        old = [(i, v) for i, v in enumerate(values) if v is not None and i not in new]
        made = [(i, v) for i, v in enumerate(values) if v is not None and i in new]
        plot_line(axes, [i for i, _ in old], [v for _, v in old], _OLD, linewidth=0.8, alpha=0.5)
        plot_marks(axes, [i for i, _ in old], [v for _, v in old], _OLD, markersize=4)
        if made:
            plot_marks(axes, [i for i, _ in made], [v for _, v in made], _NEW, filled=False)
        axes.set_ylim(0, 1.12 * max([v for _, v in (*old, *made)], default=1) or 1)
        layer_axis(axes, analysis.layers, "layer")
        axes.set_ylabel(label)

    return Panel(title, draw, height=PANEL_HEIGHT)
