"""What each layer adds to the residual stream, before and after training where both were analysed.

Two analyses belong together if they are of the same architecture with the same new layers, on the same text: the one
given first is drawn open, the other filled.
Block influence is 1 − cosine(in, out) of a layer, averaged over tokens (ShortGPT, arXiv 2403.03853).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from lesa_ray.report.page.figure import Entry, Figure, Panel, layer_axis, plot_line, plot_marks
from lesa_ray.report.page.palette import AXIS, MUTED, NEW, SERIES, Stroke
from lesa_ray.report.page.schema import Analysis, LayerShare
from lesa_ray.report.page.weights import how_analyze
from lesa_ray.report.page.words import big

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = (
    ("attention", "attention", "‖attention's output‖ / ‖stream‖"),
    ("mlp", "MLP", "‖MLP's output‖ / ‖stream‖"),
    ("block", "whole layer", "‖out − in‖ / ‖in‖"),
    ("influence", "block influence", "1 − cosine(in, out)"),
)
_OLD, _NEW = Stroke(SERIES[0], "o"), Stroke(NEW, "D")


@dataclass(frozen=True)
class Pair:
    """An analysis with residual figures, and another of the same layers on the same text after training, if there is
    one."""

    label: str
    before: Analysis
    after: Analysis | None = None
    after_label: str = ""


def pair_up(analyses: Sequence[tuple[str, Analysis]]) -> list[Pair]:
    """Each analysis that has residual figures once, with the next one of the same layers on the same text."""
    left = [(label, one) for label, one in analyses if one.residual is not None and one.residual.layers]
    pairs = []
    while left:
        label, first = left.pop(0)
        at = next((i for i, (_, one) in enumerate(left) if _alike(one) == _alike(first)), None)
        if at is None:
            pairs.append(Pair(label, first))
        else:
            name, second = left.pop(at)
            pairs.append(Pair(label, first, second, name))
    return pairs


def _alike(analysis: Analysis) -> tuple[object, ...]:
    """What two analyses have in common if they may be of one model before and after training."""
    assert analysis.residual is not None
    read = (analysis.residual.data, analysis.residual.tokens)
    return (analysis.family, analysis.hidden_size, analysis.layers, analysis.new_layers, *read)


def residual_figure(pair: Pair, name: str) -> Figure | None:
    """Panels for attention, MLP, the whole layer, and block influence, over depth."""
    found = _rows(pair.before)
    after = _rows(pair.after) if pair.after is not None else None
    parts = [part for part in _PARTS if any(_value(row, part[0]) is not None for row in found)]
    if not parts:
        return None
    assert pair.before.residual is not None
    tokens = pair.before.residual.tokens
    where = f", over {big(tokens)} tokens" if tokens else ""
    two = f"{pair.label} and {pair.after_label}" if after is not None else pair.label
    return Figure(
        name,
        f"What each layer adds to the residual stream: {two}",
        _words(pair, found, after, where),
        how_analyze(pair.before),
        tuple(_panel(key, title, label, pair, found, after) for key, title, label in parts),
        _legend(pair),
    )


def _legend(pair: Pair) -> tuple[Entry, ...]:
    kinds = [("old layer", _OLD), *([("new layer", _NEW)] if pair.before.new_layers else [])]
    if pair.after is None:
        return tuple(Entry(text, stroke, line=False, filled=stroke is _OLD) for text, stroke in kinds)
    return tuple(
        Entry(f"{text}, {label}", stroke, line=False, filled=filled)
        for text, stroke in kinds
        for label, filled in ((pair.label, False), (pair.after_label, True))
    )


def _rows(analysis: Analysis) -> list[LayerShare]:
    assert analysis.residual is not None
    return analysis.residual.layers


def _value(row: LayerShare, key: str) -> float | None:
    if key == "influence":
        return None if row.cosine is None else 1 - row.cosine
    value: float | None = getattr(row, key)
    return value


def _mean(rows: list[LayerShare], layers: Sequence[int], key: str = "block") -> float | None:
    values = [v for i in layers if i < len(rows) and (v := _value(rows[i], key)) is not None]
    return fmean(values) if values else None


def _words(pair: Pair, before: list[LayerShare], after: list[LayerShare] | None, where: str) -> str:
    new = pair.before.new_layers
    old = [i for i in range(pair.before.layers) if i not in set(new)]
    ours, theirs = _mean(before, new), _mean(before, old)
    if not new or ours is None or theirs is None:
        blocks = {i: v for i, row in enumerate(before) if (v := _value(row, "influence")) is not None}
        if not blocks:
            return f"Only part of the figures could be measured{where}."
        most, least = max(blocks, key=lambda i: blocks[i]), min(blocks, key=lambda i: blocks[i])
        return (
            f"Layer {most} turns the stream most (block influence {blocks[most]:.3f}), layer {least} least "
            f"({blocks[least]:.3f}){where}."
        )
    said = f"A new layer changes the stream by {ours:.3f} of its norm on average, an old one by {theirs:.3f}{where}"
    if after is not None and (now := _mean(after, new)) is not None:
        said += f"; in {pair.after_label} a new one by {now:.3f}"
        if (then := _mean(after, old)) is not None:
            said += f", an old one by {then:.3f}"
    elif after is None:
        said += "; an analysis of the same layers after training would show what they have learned to add"
    return said + "."


def _panel(
    key: str, title: str, label: str, pair: Pair, before: list[LayerShare], after: list[LayerShare] | None
) -> Panel:
    def draw(axes: Axes) -> None:
        new = set(pair.before.new_layers)
        first = {i: v for i, row in enumerate(before) if (v := _value(row, key)) is not None}
        second = {i: v for i, row in enumerate(after or []) if (v := _value(row, key)) is not None}
        for i in first.keys() & second.keys():
            axes.plot([i, i], [first[i], second[i]], color=AXIS, linewidth=0.8, zorder=1)
        if after is None:
            old = [i for i in first if i not in new]
            plot_line(axes, old, [first[i] for i in old], _OLD, linewidth=0.8, alpha=0.5)
        for values, filled in ((first, after is None), (second, True)):
            for stroke, chosen in (
                (_OLD, [i for i in values if i not in new]),
                (_NEW, [i for i in values if i in new]),
            ):
                solid = filled and not (after is None and stroke is _NEW)
                plot_marks(axes, chosen, [values[i] for i in chosen], stroke, filled=solid, markersize=4.5)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        layer_axis(axes, pair.before.layers, "layer")
        axes.set_ylabel(label)

    return Panel(title, draw, width=4.4, height=2.7)
