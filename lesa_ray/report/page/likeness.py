"""How alike neighbouring layers are: as they lie in the files, and after the best matching, beside chance.

Neurons and heads may be permuted freely within a layer, so entries of neighbouring layers need not correspond. Matching
them lifts the cosine of any two layers, a random one's too: only what exceeds that says something.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.report.page.figure import Entry, Figure, Panel, Table, layer_axis, plot_line
from lesa_ray.report.page.measures import known
from lesa_ray.report.page.palette import MUTED, SERIES, Stroke
from lesa_ray.report.page.schema import Analysis, TypeFigures
from lesa_ray.report.page.weights import PANEL_HEIGHT, how_analyze, shown_types
from lesa_ray.report.page.words import short_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_NONE = 0.02
"""A mean cosine that says nothing."""
_COSINES = (
    ("neighbour_cosine", "as they lie in the files", Stroke(SERIES[0], "o")),
    ("neighbour_cosine_matched", "after the best matching", Stroke(SERIES[1], "s")),
    ("neighbour_cosine_chance", "a random layer, matched alike", Stroke(MUTED, "D", (2, 2))),
)


def neighbours_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """Cosine of each layer to the next: as stored, matched, and what matching gives by chance."""
    types = {t: f for t, f in shown_types(analysis).items() if known(f.neighbour_cosine or [])}
    if not types:
        return None
    present = [
        (key, text, stroke)
        for key, text, stroke in _COSINES
        if any(known(getattr(f, key) or []) for f in types.values())
    ]
    return Figure(
        name,
        f"How alike neighbouring layers are: {label}",
        _neighbour_words(types, analysis),
        how_analyze(analysis),
        tuple(_neighbour_panel(t, f, analysis) for t, f in types.items()),
        tuple(Entry(text, stroke) for _, text, stroke in present),
        Table(
            ("weight type", *(text for _, text, _ in present)),
            tuple((short_type(t), *(_mean_cell(getattr(f, key)) for key, _, _ in present)) for t, f in types.items()),
        ),
    )


def _mean_cell(values: list[float | None] | None) -> str:
    found = known(values or [])
    return f"{fmean(found):.3f}".replace("-", "−") if found else "–"


def _neighbour_words(types: dict[str, TypeFigures], analysis: Analysis) -> str:
    plain = {t: fmean(known(f.neighbour_cosine or [])) for t, f in types.items()}
    most = max(plain, key=lambda t: abs(plain[t]))
    said = f"As stored, {short_type(most)} is most alike from layer to layer (mean cosine {plain[most]:.3f})"
    if abs(plain[most]) < _NONE:
        said = f"As stored, no weight type is alike from layer to layer (mean cosines within ±{_NONE})"
    pairs = old_pairs(analysis)
    excess = {}
    for t, f in types.items():
        both = zip(f.neighbour_cosine_matched or [], f.neighbour_cosine_chance or [], strict=False)
        gaps = [m - c for at, (m, c) in enumerate(both) if m is not None and c is not None and at in pairs]
        if gaps:
            excess[t] = fmean(gaps)
    if not excess:
        return f"{said.replace('-', '−')}; neurons and heads may be permuted freely, and no matching was measured."
    best = max(excess, key=lambda t: excess[t])
    of = " (between old layers)" if analysis.new_layers else ""
    if excess[best] > 0:
        said += f"; after matching neurons and heads {short_type(best)} exceeds chance most, by {excess[best]:.3f}{of}"
    else:
        said += f"; after matching neurons and heads no weight type exceeds chance{of}"
    return f"{said.replace('-', '−')}. Matching lifts a random layer too: only the excess counts."


def old_pairs(analysis: Analysis) -> set[int]:
    """The pairs (i, i+1) of neighbours that are both old; all pairs, if there is none such."""
    new = set(analysis.new_layers)
    pairs = set(range(analysis.layers - 1))
    return {at for at in pairs if not {at, at + 1} & new} or pairs


def _neighbour_panel(name: str, figures: TypeFigures, analysis: Analysis) -> Panel:
    def draw(axes: Axes) -> None:
        for key, _, stroke in _COSINES:
            values = getattr(figures, key) or []
            points = [(i + 0.5, v) for i, v in enumerate(values) if v is not None]
            plot_line(
                axes,
                [x for x, _ in points],
                [y for _, y in points],
                stroke,
                marker=stroke.marker,
                markersize=3.2,
                linewidth=1.1,
            )
        axes.axhline(0, color=MUTED, linewidth=0.8)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.05), max(high, 0.1))
        layer_axis(axes, analysis.layers, "between layers")
        axes.set_ylabel("cosine")

    return Panel(short_type(name), draw, height=PANEL_HEIGHT)
