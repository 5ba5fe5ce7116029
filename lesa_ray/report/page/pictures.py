"""Layers as points: PCA and t-SNE of their leading coefficients, a panel for each weight type.

The picture of the LESA paper (arXiv 2502.13794), which reads continuity in it, mostly for gate_proj. A picture misleads
easily, so each panel of components has a number: the mean distance of consecutive layers over that of all pairs. 1 is
no order at all; a smooth path of many layers comes near 0. Random weights have types far below 1, so it counts where
fewer than 5 % of random orders of the layers, over all weight types together, come as low. New layers are drawn and do
not count in it. t-SNE has no such number: it keeps who is near whom, and its distances mean nothing.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.report.page.figure import Figure, Panel, Table, plot_marks
from lesa_ray.report.page.measures import orderliness, orderly_by_chance
from lesa_ray.report.page.palette import AXIS, INK, NEW, Stroke, depth_colour
from lesa_ray.report.page.schema import Analysis, Points
from lesa_ray.report.page.weights import depth_entries, how_analyze, shown_types
from lesa_ray.report.page.words import percent, short_type, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Placed = dict[int, list[float]]
"""Points by layer."""


def picture_figure(analysis: Analysis, label: str, name: str, kind: str) -> Figure | None:
    """kind: pca or tsne. None where no weight type has it."""
    points: dict[str, Placed] = {}
    for t, figures in shown_types(analysis).items():
        found = figures.pictures.pca if kind == "pca" else figures.pictures.tsne
        placed = {at: point for at, point in enumerate(found or []) if point is not None}
        if placed and all(len(point) == 2 for point in placed.values()):
            points[t] = placed
    if not points:
        return None
    of = "old layers" if analysis.new_layers else "layers"
    title, see = "t-SNE", "It keeps which layers are near each other; how far apart the others are means nothing in it."
    orders: dict[str, float] = {}
    table = None
    if kind == "pca":
        paths = {t: _old(found, analysis) for t, found in points.items()}
        orders = {t: value for t, path in paths.items() if (value := orderliness(path)) is not None}
        chance = {t: orderly_by_chance(paths[t], len(orders)) for t in orders}
        title, see = "Principal components", _order_words(orders, chance, of)
        table = Table(
            ("weight type", f"distance of consecutive {of} over that of all pairs", "by chance down to"),
            tuple((short_type(t), f"{value:.3f}", f"{chance[t]:.3f}") for t, value in orders.items()),
        )
    return Figure(
        name,
        f"{title} of the layers' leading coefficients: {label}",
        see,
        how_analyze(analysis),
        tuple(_panel(t, found, analysis, orders.get(t), kind) for t, found in points.items()),
        depth_entries(analysis),
        table,
    )


def _order_words(orders: dict[str, float], chance: dict[str, float], of: str) -> str:
    """By weight type: the order, and what it comes down to by chance."""
    if not orders:
        return "There are too few layers for an order."
    clear = [t for t in orders if orders[t] < chance[t]]
    if not clear:
        low, high, least = min(orders.values()), max(orders.values()), min(chance.values())
        return (
            f"No weight type follows the depth more than chance has it: consecutive {of} are {low:.2f} to {high:.2f} "
            f"times as far apart as any two (1 would be no order; by chance it comes down to {least:.2f})."
        )
    best = min(clear, key=orders.__getitem__)
    rest = [short_type(t) for t in orders if t not in clear]
    end = f"; no more than by chance does {some(rest)}" if rest else ""
    return (
        f"{short_type(best)} follows the depth most closely: consecutive {of} are {orders[best]:.2f} times as far "
        f"apart as any two (1 would be no order; by chance it comes down to {chance[best]:.2f}){end}."
    )


def _old(points: Placed, analysis: Analysis) -> Points:
    return [point for at, point in points.items() if at not in analysis.new_layers]


def _panel(name: str, points: Placed, analysis: Analysis, order: float | None, kind: str) -> Panel:
    share = analysis.types[name].pictures.pca_share or []

    def draw(axes: Axes) -> None:
        new = set(analysis.new_layers)
        middle = [fmean(point[axis] for point in points.values()) for axis in (0, 1)]
        path = _old(points, analysis)
        axes.plot([p[0] for p in path], [p[1] for p in path], color=AXIS, linewidth=0.7, alpha=0.7, zorder=1)
        for at, (px, py) in points.items():
            if at in new:
                plot_marks(axes, [px], [py], Stroke(NEW, "D"), filled=False, markersize=5)
            else:
                plot_marks(axes, [px], [py], Stroke(depth_colour(at, analysis.layers), "o"), markersize=5)
        for at in sorted({min(points), max(points)}):
            px, py = points[at]
            outward = (7 if px >= middle[0] else -7, 7 if py >= middle[1] else -7)
            axes.annotate(
                str(at), (px, py), xytext=outward, textcoords="offset points", fontsize=8, color=INK,
                ha="center", va="center",
            )  # fmt: skip
        axes.margins(0.14)
        axes.locator_params(nbins=4)
        axes.tick_params(labelbottom=kind == "pca", labelleft=kind == "pca", length=0)
        for axis, number, word in (("x", 0, "first"), ("y", 1, "second")):
            part = f", {percent(share[number])} of variance" if kind == "pca" and len(share) > number else ""
            text = f"{word} component{part}" if kind == "pca" else f"{word} t-SNE axis (no unit)"
            (axes.set_xlabel if axis == "x" else axes.set_ylabel)(text)

    title = short_type(name) + ("" if order is None else f", order {order:.2f}")
    return Panel(title, draw, height=2.8)
