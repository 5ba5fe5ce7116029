"""What a person sees of an analysis: a row for each weight type, a row for each layer, and how to read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

_BAR = 20
_NUMBERS = ("attention", "mlp", "block")


def analysis_table(report: dict[str, Any]) -> Group:
    """The content of analysis.json as tables with captions, for `terminal.console.print`."""
    parts: list[Table | Text] = [_head(report)]
    if report["uneven"] is not None:
        parts.append(Text(report["uneven"], style="dim"))
    parts += [_types(report), Text(_TYPES_CAPTION, style="dim")]
    parts += [_neighbours(report), Text(_neighbours_caption(report), style="dim")]
    if report["residual"] is not None:
        residual = report["residual"]
        parts += [_layers(residual, report["new_layers"]), Text(_layers_caption(residual), style="dim")]
    return Group(*parts)


def _head(report: dict[str, Any]) -> Text:
    new = report["new_layers"]
    width = f", width {report['hidden_size']:,}" if report["hidden_size"] else ""
    grown = f"; new: {', '.join(map(str, new))}" if new else ""
    return Text(f"{report['checkpoint']}: {report['family']}, {report['layers']} layers{width}{grown}", style="bold")


def old_pairs(layers: int, new_layers: Collection[int]) -> list[int]:
    """The i for which layers i and i+1 are both old. What is said of pairs is said of these: a copy is like its source
    whatever the model, so a grown model's other pairs tell of the method."""
    return [at for at in range(layers - 1) if not {at, at + 1} & {*new_layers}]


def _types(report: dict[str, Any]) -> Table:
    old = [layer for layer in range(report["layers"]) if layer not in report["new_layers"]]
    of = "old layers" if report["new_layers"] else "layers"
    table = _table(f"Weights, means over the {of}", "weight type", "shape")
    for name in ("norm", "effective rank", "stable rank", "in 64 directions"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, found in report["types"].items():
        shapes = [found["shapes"][layer] for layer in old] if found["shapes"] else [found["shape"]]
        norm, rank, stable = (
            _mean([found[key][layer] for layer in old]) for key in ("norms", "effective_rank", "stable_rank")
        )
        full = _mean([min(shape) for shape in shapes])
        table.add_row(
            name.removesuffix(".weight"),
            " × ".join(_range(sizes) for sizes in zip(*shapes, strict=True)),
            _number(norm),
            "–" if rank is None else f"{rank:,.0f} of {full:,.0f}",
            _number(stable),
            _share(found["captured"]),
        )
    return table


_TYPES_CAPTION = "norm: Frobenius; in 64 directions: their energy's share in the leading 64 of their common basis"


def _neighbours(report: dict[str, Any]) -> Table:
    fitted, matched = _is_fitted(report), report["matched_missing"] is None
    table = _table("Neighbouring layers, means", "weight type")
    names = ["cosine", *(["matched", "by chance"] if matched else [])]
    names += ["R² fit", "R² mean", "R² ridge"] if fitted else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    pairs = old_pairs(report["layers"], report["new_layers"])
    kinds = ["", *(["_matched", "_chance"] if matched else [])]
    for name, found in report["types"].items():
        cells = [_number(_mean([found[f"neighbour_cosine{kind}"][at] for at in pairs])) for kind in kinds]
        if fitted:
            scores = report["fit"].get(name, {})
            cells += [_number(scores.get(one, {}).get("r2")) for one in ("predictor", "mean", "ridge")]
        table.add_row(name.removesuffix(".weight"), *cells)
    return table


def _neighbours_caption(report: dict[str, Any]) -> str:
    text = "cosine: of a layer and the next, number by number"
    if report["matched_missing"] is None:
        text += "; matched: after neurons and heads were matched; by chance: a random layer, matched in the same way"
    else:
        text += f"; not matched: {report['matched_missing']}"
    if report["new_layers"]:
        text += "; all of old layers alone, cosines of those side by side"
    if not _is_fitted(report):
        text += f"; not fitted: {report['fit_missing']}"
    else:
        on = sorted({one["on"] for one in report["fit"].values()})
        text += f"; R² on {' and '.join(on)}: 1 is perfect, 0 is predicting zero"
    return text


def _is_fitted(report: dict[str, Any]) -> bool:
    return report["fit"] is not None and all("predictor" in one for one in report["fit"].values())


def _layers(residual: dict[str, Any], new_layers: Sequence[int]) -> Table:
    table = _table("What each layer does to the residual stream")
    for name in ("layer", "attention", "mlp", "block", "influence"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    influences = [None if one["cosine"] is None else 1 - one["cosine"] for one in residual["layers"]]
    longest = max((value for value in influences if value is not None), default=0.0)
    for index, (layer, influence) in enumerate(zip(residual["layers"], influences, strict=True)):
        bar = "" if influence is None or longest <= 0 else "█" * round(_BAR * max(influence, 0) / longest)
        is_new = index in new_layers
        table.add_row(
            f"{index}{' new' if is_new else ''}",
            *(_number(layer[name]) for name in _NUMBERS),
            "–" if influence is None else f"{influence:.4f}",
            bar,
            style="bold green" if is_new else None,
        )
    return table


def _layers_caption(residual: dict[str, Any]) -> str:
    text = (
        f"over {residual['tokens']:,} tokens of {residual['data']}; attention, mlp, block: what they add, over the "
        "stream's norm; influence: 1 − cosine of the stream before and after (ShortGPT's block influence)"
    )
    return text if residual["unsplit"] is None else f"{text}; attention and mlp are not told: {residual['unsplit']}"


def _table(title: str, *left: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _range(sizes: Sequence[int]) -> str:
    """From the least to the largest."""
    return str(sizes[0]) if len({*sizes}) == 1 else f"{min(sizes)} … {max(sizes)}"


def _share(captured: dict[str, float]) -> str:
    """Of 64 directions, or of all where there are fewer."""
    known = {int(count): share for count, share in captured.items() if int(count) <= 64}
    return f"{known[max(known)]:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
