"""Singular values: of each layer, their effective number, and of the old layers side by side (LESA's common basis)."""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.report.page.figure import Entry, Figure, Panel, layer_axis, plain_log, plot_line, plot_marks
from lesa_ray.report.page.measures import known
from lesa_ray.report.page.palette import MUTED, NEW, Stroke, depth_colour
from lesa_ray.report.page.schema import Analysis, TypeFigures
from lesa_ray.report.page.weights import PANEL_HEIGHT, depth_entries, how_analyze, shown_types, type_strokes
from lesa_ray.report.page.words import percent, short_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_LEAST = 1e-4
"""Least share of the largest singular value that is drawn: what is below it lies on the frame."""


def spectra_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """Singular values of every layer, as shares of its largest one."""
    types = {t: f for t, f in shown_types(analysis).items() if any(known(row) for row in f.spectra)}
    if not types:
        return None
    new = set(analysis.new_layers)
    old = set(range(analysis.layers)) - new
    whole = {t: value for t, f in types.items() if (value := _middle(f, old)) is not None}
    made = [value for f in types.values() if (value := _middle(f, new)) is not None]
    see = "The spectra hold no layer that is not zero."
    if whole:
        flat, steep = max(whole, key=lambda t: whole[t]), min(whole, key=lambda t: whole[t])
        see = (
            f"Half-way down its spectrum {short_type(flat)} still has {percent(whole[flat])} of its largest singular "
            f"value, {short_type(steep)} {percent(whole[steep])}: the flatter, the less a small rank captures."
        )
        if made:
            see += f" New layers have {100 * fmean(made):.2g} % there, old ones {percent(fmean(whole.values()))}."
    return Figure(
        name,
        f"Singular values of each layer: {label}",
        see,
        how_analyze(analysis),
        tuple(_spectra_panel(t, f, analysis) for t, f in types.items()),
        depth_entries(analysis),
    )


def _middle(figures: TypeFigures, layers: Collection[int]) -> float | None:
    """Mean over some layers of the middle singular value over the largest."""
    rows = [known(row) for at, row in enumerate(figures.spectra) if at in layers]
    found = [row[len(row) // 2] / row[0] for row in rows if row and row[0] > 0]
    return fmean(found) if found else None


def _spectra_panel(name: str, figures: TypeFigures, analysis: Analysis) -> Panel:
    def draw(axes: Axes) -> None:
        new = set(analysis.new_layers)
        smallest = 1.0
        for at, row in enumerate(figures.spectra):
            values = known(row)
            if not values or values[0] <= 0:
                continue
            x = [100 * i / max(len(values) - 1, 1) for i in range(len(values))]
            y = [max(value / values[0], _LEAST) for value in values]
            smallest = min(smallest, *y)
            if at in new:
                axes.plot(x, y, color=NEW, linewidth=1.1, dashes=(3, 1.5), alpha=0.9)
            else:
                axes.plot(x, y, color=depth_colour(at, analysis.layers), linewidth=1, alpha=0.85)
        axes.set_ylim(0.8 * smallest, 1.15)
        plain_log(axes, "y")
        axes.set_xlabel("position in the spectrum (%)")
        axes.set_ylabel(f"σ / largest σ (at least {_LEAST:g})" if smallest <= _LEAST else "σ / largest σ")

    shape = f" ({'up to ' if figures.shapes else ''}{' × '.join(map(str, figures.shape))})" if figures.shape else ""
    return Panel(short_type(name) + shape, draw, height=PANEL_HEIGHT)


def ranks_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """Effective rank as a share of the full rank, and stable rank, over depth."""
    types = {t: f for t, f in shown_types(analysis).items() if known(f.effective_rank) or known(f.stable_rank)}
    if not types:
        return None
    new = set(analysis.new_layers)
    shares = {}
    for t, f in types.items():
        old = [(at, rank) for at, rank in enumerate(f.effective_rank) if rank is not None and at not in new]
        if old and f.shape:
            shares[t] = fmean(rank / f.full_rank(at) for at, rank in old)
    see = "Effective ranks are not known."
    if shares:
        high, low = max(shares, key=lambda t: shares[t]), min(shares, key=lambda t: shares[t])
        where = "Among old layers" if new else "On average"
        see = (
            f"{where} {short_type(high)} uses {percent(shares[high])} of its full rank, {short_type(low)} "
            f"{percent(shares[low])} (effective rank: the exponential of the singular values' entropy)."
        )
        if analysis.new_layers and (gap := _new_rank(types, analysis)) is not None:
            see += f" New layers have {gap:.2f} times the effective rank of old ones."
    strokes = type_strokes(list(types))
    panels = []
    if any(known(f.effective_rank) and f.shape for f in types.values()):
        rows = {
            t: [None if v is None else 100 * v / f.full_rank(at) for at, v in enumerate(f.effective_rank)]
            for t, f in types.items()
            if f.shape
        }
        panels.append(_ranks_panel("effective rank", "% of the full rank", rows, strokes, analysis))
    if any(known(f.stable_rank) for f in types.values()):
        rows = {t: list(f.stable_rank) for t, f in types.items()}
        panels.append(_ranks_panel("stable rank", "‖W‖²_F / largest σ²", rows, strokes, analysis, log=True))
    entries = [Entry(short_type(t), stroke) for t, stroke in strokes.items()]
    if analysis.new_layers:
        entries.append(Entry("open marks: new layers", Stroke(MUTED, "o"), line=False, filled=False))
    return Figure(
        name, f"Effective and stable rank: {label}", see, how_analyze(analysis), tuple(panels), tuple(entries)
    )


def _new_rank(types: dict[str, TypeFigures], analysis: Analysis) -> float | None:
    new = set(analysis.new_layers)
    ratios = []
    for f in types.values():
        made = [v for i, v in enumerate(f.effective_rank) if v and i in new]
        old = [v for i, v in enumerate(f.effective_rank) if v and i not in new]
        if made and old:
            ratios.append(fmean(made) / fmean(old))
    return fmean(ratios) if ratios else None


def _ranks_panel(
    title: str,
    label: str,
    rows: dict[str, list[float | None]],
    strokes: dict[str, Stroke],
    analysis: Analysis,
    *,
    log: bool = False,
) -> Panel:
    def draw(axes: Axes) -> None:
        new = set(analysis.new_layers)
        for t, values in rows.items():
            stroke = strokes[t]
            points = [(i, v) for i, v in enumerate(values) if v is not None and (v > 0 or not log)]
            old = [(i, v) for i, v in points if i not in new]
            plot_line(axes, [i for i, _ in old], [v for _, v in old], stroke, linewidth=1)
            for filled in (True, False):
                some_of = [(i, v) for i, v in points if (i not in new) == filled]
                plot_marks(
                    axes, [i for i, _ in some_of], [v for _, v in some_of], stroke, filled=filled, markersize=3.5
                )
        if log:
            plain_log(axes, "y")
        else:
            axes.set_ylim(0, 105)
        layer_axis(axes, analysis.layers)
        axes.set_ylabel(label)

    return Panel(title, draw, width=4.4, height=2.9)


def captured_figure(analysis: Analysis, label: str, name: str) -> Figure | None:
    """The spectrum of the old layers side by side, and how much of it a smaller rank keeps."""
    types = {t: f for t, f in shown_types(analysis).items() if known(list(f.captured.values()))}
    if not types:
        return None
    ranks = sorted({int(rank) for f in types.values() for rank in f.captured})
    rank = str(ranks[len(ranks) // 2])
    shares = {t: share for t, f in types.items() if (share := f.captured.get(rank)) is not None}
    see, of = "How much a smaller rank keeps differs by type.", "old" if analysis.new_layers else "all"
    if shares:
        high, low = max(shares, key=lambda t: shares[t]), min(shares, key=lambda t: shares[t])
        see = (
            f"{rank} common directions hold {percent(shares[high])} of {short_type(high)}'s energy over {of} layers, "
            f"and {percent(shares[low])} of {short_type(low)}'s."
        )
    strokes = type_strokes(list(types))

    def draw(axes: Axes) -> None:
        for t, f in types.items():
            points = sorted((int(k), 100 * v) for k, v in f.captured.items() if v is not None)
            stroke = strokes[t]
            plot_line(axes, [x for x, _ in points], [y for _, y in points], stroke, marker=stroke.marker)
        plain_log(axes, "x")
        axes.set_ylim(0, 105)
        axes.set_xlabel("singular directions kept (LESA's --rank)")
        axes.set_ylabel(f"energy of {of} layers kept (%)")

    return Figure(
        name,
        f"What a basis common to {of} layers keeps: {label}",
        see,
        how_analyze(analysis),
        (Panel("", draw, width=4.4, height=2.9),),
        tuple(Entry(short_type(t), stroke) for t, stroke in strokes.items()),
    )
