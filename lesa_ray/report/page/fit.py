"""How well a layer's weights are predicted from its neighbours': the scores of `expansion.json` and `analysis.json`.

R² and cosine on held-out layers, beside predicting zero (R² 0), the neighbours' mean, and ridge regression. Neurons and
heads may be permuted freely within a layer, so where it was measured a second comparison follows: candidates after the
best matching, beside a random layer matched in the same way, as matching lifts that too. Only the excess counts, and
only where its mean over the weight types is more than its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesa_ray.comparison.statistics import paired
from lesa_ray.report.page.figure import Entry, Figure, Panel, Table, plot_marks, rows_axis, rows_height
from lesa_ray.report.page.measures import known
from lesa_ray.report.page.palette import INK, MUTED, NEW, SERIES, Stroke
from lesa_ray.report.page.plans import how_expand
from lesa_ray.report.page.schema import Analysis
from lesa_ray.report.page.sources import Expansion
from lesa_ray.report.page.words import listed, plural, short_type, signed, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORST = -1.0
"""R² below it is drawn as an arrow at the edge: it is far worse than predicting zero, how far hardly matters."""
_TYPES = 24
_STROKES = {"predictor": Stroke(NEW, "o"), "ridge": Stroke(SERIES[0], "^"), "mean": Stroke(SERIES[2], "s")}
_RANDOM = "random"
_CANDIDATES = {
    "lower": "copy of the lower neighbour",
    "upper": "copy of the upper neighbour",
    "mean": "mean of both",
    "aligned mean": "mean of both, aligned first",
}
_MATCHED = (
    Stroke(NEW, "o"),
    Stroke(SERIES[0], "^"),
    Stroke(SERIES[2], "s"),
    Stroke(SERIES[3], "v"),
    Stroke(SERIES[4], "P"),
)

Scores = dict[str, dict[str, Any]]


def fit_scores(expansion: Expansion) -> tuple[dict[str, Scores], bool]:
    """Scores by weight type and predictor, and whether they are of held-out layers; empty where nothing is fitted."""
    fits = {name: fit for name, fit in expansion.manifest["fit"].items() if isinstance(fit, dict) and "trained" in fit}
    held_out = any(fit.get("held_out") for fit in fits.values())
    return {name: fit.get("held_out") or fit["trained"] for name, fit in fits.items()}, held_out


def fit_figure(
    scores: dict[str, Scores], *, name: str, of: str, how: str, held_out: bool, predictor: str = "the predictor"
) -> Figure | None:
    """R² and cosine by weight type, beside zero, the mean of the neighbours and ridge."""
    scores = dict([(t, row) for t, row in scores.items() if _STROKES.keys() & row.keys()][:_TYPES])
    if not scores:
        return None
    types = list(scores)
    r2 = {t: _score(scores[t].get("predictor"), "r2") for t in types}
    better = [t for t in types if (value := r2[t]) is not None and value > 0]
    means = {t: _score(scores[t].get("mean"), "r2") for t in types}
    over_mean = [t for t in better if (mean := means[t]) is not None and mean < (r2[t] or 0.0)]
    where = "held-out layers" if held_out else "the layers it was trained on (none was held out)"
    see = f"On {where} {predictor} is better than predicting zero (R² above 0) for {len(better)} of "
    see += f"{plural(len(types), 'weight type')}"
    if better:
        see += f" ({some([short_type(t) for t in better])}), and better than the neighbours' mean for {len(over_mean)}"
    else:
        see += ": it predicts nothing of them here"
    panels = [_fit_panel(types, scores, "r2"), _fit_panel(types, scores, "cosine")]
    present = [key for key in _STROKES if any(_score(scores[t].get(key), "r2") is not None for t in types)]
    names = {"predictor": predictor, "ridge": "ridge regression", "mean": "mean of the neighbours"}
    worse = any((_score(scores[t].get(key), "r2") or 0.0) < _WORST for t in types for key in present)
    return Figure(
        name,
        f"How well the weights of a layer are predicted from its neighbours: {of}",
        see + ".",
        how,
        tuple(panels),
        (
            *(Entry(names[key], _STROKES[key], line=False) for key in present),
            *([Entry("below −1", Stroke(MUTED, "<"), line=False, filled=False)] if worse else []),
        ),
        Table(
            ("weight type", *(f"{kind} {key}" for key in ("R²", "cosine") for kind in present)),
            tuple(
                (
                    short_type(t),
                    *(_cell(_score(scores[t].get(k), key)) for key in ("r2", "cosine") for k in present),
                )
                for t in types
            ),
        ),
    )


def _score(found: Any, key: str) -> float | None:
    value = found.get(key) if isinstance(found, dict) else found if key == "cosine" else None
    return float(value) if isinstance(value, int | float) else None


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _fit_panel(types: list[str], scores: dict[str, Scores], key: str) -> Panel:
    names = [short_type(t) for t in types]

    def draw(axes: Axes) -> None:
        rows_axis(axes, names, wrap=16)
        axes.grid(axis="y", visible=False)
        for at, t in enumerate(types):
            for number, (rival, stroke) in enumerate(_STROKES.items()):
                value = _score(scores[t].get(rival), key)
                if value is None:
                    continue
                y = at + (number - 1) * 0.24
                if value < _WORST:
                    plot_marks(axes, [_WORST], [y], Stroke(stroke.colour, "<"), filled=False, clip_on=False)
                else:
                    plot_marks(axes, [value], [y], stroke)
        axes.axvline(0, color=INK, linewidth=1)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.1), max(high, 0.1))
        axes.set_xlabel("R² (1 perfect, 0 as predicting zero)" if key == "r2" else "cosine to the true layer")
        axes.locator_params(axis="x", nbins=5)

    return Panel("error" if key == "r2" else "direction", draw, height=rows_height(names, wrap=16))


def matched_figure(analysis: Analysis, label: str, name: str, how: str) -> Figure | None:
    """Cosine of candidates to the true layer after the best matching, beside a random layer matched alike."""
    found = {t: row for t, scores in (analysis.fit or {}).items() if (row := _cosines(scores.get("matched")))}
    types = list(found)[:_TYPES]
    if not types:
        return None
    kinds = list(dict.fromkeys(kind for t in types for kind in found[t] if kind != _RANDOM))
    strokes = {kind: _MATCHED[i % len(_MATCHED)] for i, kind in enumerate(kinds)}

    def draw(axes: Axes) -> None:
        rows_axis(axes, [short_type(t) for t in types])
        axes.grid(axis="y", visible=False)
        for at, t in enumerate(types):
            if _RANDOM in found[t]:
                plot_marks(axes, [found[t][_RANDOM]], [at], Stroke(MUTED, "D"), filled=False, markersize=6)
            for number, kind in enumerate(kinds):
                if kind in found[t]:
                    y = at + (number - (len(kinds) - 1) / 2) * 0.7 / len(kinds)
                    plot_marks(axes, [found[t][kind]], [y], strokes[kind], markersize=4.5)
        axes.margins(x=0.1)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("cosine to the true layer after the best matching")

    return Figure(
        name,
        f"How near candidates come to a true layer once neurons and heads are matched: {label}",
        _matched_words([found[t] for t in types], kinds),
        how,
        (Panel("", draw, width=4.6, height=rows_height([short_type(t) for t in types]) + 0.2),),
        (
            *(Entry(_CANDIDATES.get(kind, kind), strokes[kind], line=False) for kind in kinds),
            Entry("a random layer, matched alike", Stroke(MUTED, "D"), line=False, filled=False),
        ),
        Table(
            ("weight type", *kinds, _RANDOM),
            tuple((short_type(t), *(_cell(found[t].get(kind)) for kind in (*kinds, _RANDOM))) for t in types),
        ),
    )


def _cosines(found: Any) -> dict[str, float]:
    if not isinstance(found, dict):
        return {}
    values = {str(name): _score(value, "cosine") for name, value in found.items()}
    return {name: value for name, value in values.items() if value is not None}


def _matched_words(rows: list[dict[str, float]], kinds: list[str]) -> str:
    by_chance = {at: row[_RANDOM] for at, row in enumerate(rows) if _RANDOM in row}
    cosines = {kind: {at: row[kind] for at, row in enumerate(rows) if kind in row} for kind in kinds}
    excess = [(kind, paired(values, by_chance, family=len(kinds))) for kind, values in cosines.items()]
    found = sorted(((kind, one) for kind, one in excess if one is not None), key=lambda pair: -pair[1].mean)
    if not found:
        return "No random layer was matched alike, so what these cosines are worth cannot be said."
    said = [f"{kind} {signed(one.mean, 3)}" + ("" if one.half is None else f" ± {one.half:.3f}") for kind, one in found]
    end = "" if any(one.clear and one.mean > 0 for _, one in found) else "; none of them is clearly nearer than chance"
    return f"Above what a random layer reaches, mean and 95 % interval over the weight types: {listed(said)}{end}."


def ratios_figure(expansions: Sequence[Expansion]) -> Figure | None:
    """Norm of the predicted weights over their neighbours', by weight type, where the expansion says it."""
    found = {
        one.label: {
            name: fit["norm_ratio"]
            for name, fit in one.manifest["fit"].items()
            if isinstance(fit, dict) and isinstance(fit.get("norm_ratio"), int | float)
        }
        for one in expansions
        if not one.trained
    }
    found = {label: ratios for label, ratios in found.items() if ratios}
    if not found:
        return None
    every = list(dict.fromkeys(name for ratios in found.values() for name in ratios))
    types = every[:_TYPES]
    values = known([ratio for ratios in found.values() for ratio in ratios.values()])
    low, high = min(values), max(values)
    tail = (
        "they write less into the residual stream than a real layer would"
        if high < 0.95
        else ("1 is a layer as large as its neighbours")
    )
    labels = list(found)[: len(SERIES)]
    if len(labels) < len(found):
        tail += f"; {len(labels)} of {len(found)} expansions are drawn, the table has them all"
    strokes = {label: Stroke(SERIES[(i + 1) % len(SERIES)], "osD^vPXp"[i % 8]) for i, label in enumerate(labels)}
    first = next(one for one in expansions if one.label == labels[0])

    def draw(axes: Axes) -> None:
        rows_axis(axes, [short_type(t) for t in types])
        axes.grid(axis="y", visible=False)
        for number, label in enumerate(labels):
            rows = [at for at, t in enumerate(types) if t in found[label]]
            shift = (number - (len(labels) - 1) / 2) * 0.6 / len(labels)
            plot_marks(axes, [found[label][types[at]] for at in rows], [at + shift for at in rows], strokes[label])
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlim(left=0, right=max(1.1, 1.06 * high))
        axes.set_xlabel("norm of the new layers over their neighbours'")

    return Figure(
        "norm-ratios",
        "Norm of predicted weights beside their neighbours'",
        f"The predicted matrices have {low:.2f} to {high:.2f} times the norm of their neighbours; {tail}.",
        how_expand(first),
        (Panel("", draw, width=4.2, height=rows_height([short_type(t) for t in types])),),
        tuple(Entry(label, strokes[label], line=False) for label in labels),
        Table(
            ("weight type", *found),
            tuple(
                (short_type(t), *("–" if t not in one else f"{one[t]:.3f}" for one in found.values())) for t in every
            ),
        ),
    )


def analysis_scores(analysis: Analysis) -> tuple[dict[str, Scores], bool]:
    """The fit that `analyze` measured, as `fit_scores`."""
    scores = {name: dict(found) for name, found in (analysis.fit or {}).items()}
    return scores, all(found.get("on", "held-out layers") == "held-out layers" for found in scores.values())
