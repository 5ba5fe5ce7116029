"""How alike neighbouring layers are: as they lie in the files, and after the best matching, beside chance.

Neurons and heads may be permuted freely within a layer, so entries of neighbouring layers need not correspond. Matching
them lifts the cosine of any two layers, a random one's too: only what exceeds that says something. Of random weights
some type exceeds it, too, if by little: it counts where the mean over the pairs of layers is more than its 95 %
interval, which is widened for the number of types.

Of a grown model the words and the table are of neighbours that are both old; the picture marks the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.comparison.statistics import Difference, paired
from lesa_ray.report.analysis import old_pairs
from lesa_ray.report.page.figure import Entry, Figure, Panel, Table, layer_axis, plot_line, plot_marks
from lesa_ray.report.page.measures import known
from lesa_ray.report.page.palette import MUTED, SERIES, Stroke
from lesa_ray.report.page.schema import Analysis, TypeFigures
from lesa_ray.report.page.weights import PANEL_HEIGHT, how_analyze, shown_types
from lesa_ray.report.page.words import plural, short_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_NONE = 0.02
"""A mean cosine that says nothing."""
_COSINES = (
    ("neighbour_cosine", "as they lie in the files", Stroke(SERIES[0], "o")),
    ("neighbour_cosine_matched", "after the best matching", Stroke(SERIES[1], "s")),
    ("neighbour_cosine_chance", "a random layer, matched alike", Stroke(MUTED, "D", (2, 2))),
)
_WITH_NEW = Entry("as they lie in the files, one of them new", Stroke(SERIES[0], "D"), line=False, filled=False)


def neighbours_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """Cosine of each layer to the next: as stored, matched, and what matching gives by chance."""
    types = {t: f for t, f in shown_types(analysis).items() if known(f.neighbour_cosine or [])}
    if not types:
        return None
    pairs = old_pairs(analysis.layers, analysis.new_layers)
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
        (*(Entry(text, stroke) for _, text, stroke in present), *([_WITH_NEW] if analysis.new_layers else [])),
        Table(
            ("weight type", *(text for _, text, _ in present)),
            tuple(
                (short_type(t), *(_mean_cell(_of(getattr(f, key), pairs)) for key, _, _ in present))
                for t, f in types.items()
            ),
        ),
    )


def _of(values: list[float | None] | None, pairs: Sequence[int]) -> list[float]:
    """Those of the pairs, where they are known."""
    return known([(values or [])[at] for at in pairs if at < len(values or [])])


def _mean_cell(found: list[float]) -> str:
    return f"{fmean(found):.3f}".replace("-", "−") if found else "–"


def _neighbour_words(types: dict[str, TypeFigures], analysis: Analysis) -> str:
    pairs = old_pairs(analysis.layers, analysis.new_layers)
    plain = {t: fmean(found) for t, f in types.items() if (found := _of(f.neighbour_cosine, pairs))}
    if not plain:
        return "No two old layers lie side by side, so of their likeness nothing can be said here; analyze the base."
    most = max(plain, key=lambda t: abs(plain[t]))
    of = "between old layers" if analysis.new_layers else "from layer to layer"
    said = f"As stored, {short_type(most)} is most alike {of} (mean cosine {plain[most]:.3f})"
    if abs(plain[most]) < _NONE:
        said = f"As stored, no weight type is alike {of} (mean cosines within ±{_NONE})"
    excess = _excess(types, pairs)
    if not excess:
        return f"{said.replace('-', '−')}; neurons and heads may be permuted freely, and no matching was measured."
    clear = [t for t, one in excess.items() if one.clear and one.mean > 0]
    if clear:
        best = max(clear, key=lambda t: excess[t].mean)
        said += (
            f"; after matching neurons and heads {short_type(best)} exceeds chance most, by {excess[best].mean:.3f} ± "
            f"{excess[best].half:.3f}, and {len(clear)} of {plural(len(excess), 'weight type')} do clearly"
        )
    else:
        said += "; after matching neurons and heads no weight type clearly exceeds chance"
    return f"{said.replace('-', '−')}. Matching lifts a random layer too: only the excess counts."


def _excess(types: dict[str, TypeFigures], pairs: Sequence[int]) -> dict[str, Difference]:
    """Mean over the pairs of the cosine after matching less that by chance, where both are known."""
    found = {}
    for t, f in types.items():
        matched, chance = (
            {at: value for at, value in enumerate(values or []) if value is not None and at in pairs}
            for values in (f.neighbour_cosine_matched, f.neighbour_cosine_chance)
        )
        found[t] = paired(matched, chance, family=len(types))
    return {t: one for t, one in found.items() if one is not None}


def _neighbour_panel(name: str, figures: TypeFigures, analysis: Analysis) -> Panel:
    def draw(axes: Axes) -> None:
        pairs = old_pairs(analysis.layers, analysis.new_layers)
        for key, _, stroke in _COSINES:
            points = [(i + 0.5, v) for i, v in enumerate(getattr(figures, key) or []) if v is not None]
            others = [(x, v) for x, v in points if int(x) not in pairs]
            points = [(x, v) for x, v in points if int(x) in pairs]
            plot_marks(axes, [x for x, _ in others], [v for _, v in others], _WITH_NEW.stroke, filled=False)
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
