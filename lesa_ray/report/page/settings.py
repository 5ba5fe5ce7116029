"""The settings and versions behind a page, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesa_ray.config import flat
from lesa_ray.report.page.figure import Table
from lesa_ray.report.page.schema import Comparison
from lesa_ray.report.page.sources import Material


def settings_tables(material: Material) -> list[tuple[str, Table]]:
    """A table each comparison, one of all expansions, one of all training runs, one of all analyses."""
    tables: list[tuple[str, Table]] = []
    for place, comparison in material.comparisons:
        tables.append((f"Comparison {comparison.name}", _comparison(place, comparison)))
        tables.append((f"Arms of {comparison.name}: what differs from the defaults", _arms(comparison)))
    if material.expansions:
        columns = {
            one.label: {
                "base": one.manifest["base"],
                "method": one.manifest["method"],
                "lesa_ray": one.manifest.get("identity", {}).get("lesa_ray"),
                **flat(one.manifest.get("identity", {}).get("settings", {})),
                "new layers": _span(one.manifest["new_layers"]),
                "zeroed": ", ".join(one.manifest.get("zeroed", [])),
            }
            for one in material.expansions
        }
        tables.append(("Expansions", _side_by_side(columns)))
    if material.trainings:
        columns = {one.label: {**flat(one.settings), **flat(one.result)} for one in material.trainings}
        tables.append(("Training runs", _side_by_side(columns)))
    if material.analyses:
        columns = {
            f"{at + 1}. {one.checkpoint}": {
                "family": one.family,
                "layers": one.layers,
                "hidden size": one.hidden_size,
                "new layers": _span(one.new_layers),
                "text": one.residual.data if one.residual else None,
                **{f"version of {name}": text for name, text in one.created_with.items()},
            }
            for at, (_, one) in enumerate(material.analyses)
        }
        tables.append(("Analyses", _side_by_side(columns)))
    return tables


def _comparison(place: str, comparison: Comparison) -> Table:
    facts = {
        "read from": place,
        "file": comparison.file,
        **{f"base: {name}": value for name, value in comparison.base.model_dump().items()},
        **{f"data: {name}": value for name, value in comparison.data.model_dump().items()},
        "tokens of an arm": comparison.tokens,
        "lesa_ray": comparison.lesa_ray,
        **{f"machine: {name}": value for name, value in comparison.machine.model_dump().items()},
    }
    return Table(("", "value"), tuple((name, _cell(value)) for name, value in facts.items()))


def _arms(comparison: Comparison) -> Table:
    rows = []
    for arm in comparison.arms:
        settings = "; ".join(f"{name} = {_cell(value)}" for name, value in flat(arm.settings).items())
        seeds = ", ".join(f"{trial.seed}: {trial.status}" for trial in arm.runs)
        rows.append((arm.name, arm.method or "–", arm.position or "–", settings or "–", seeds or "–"))
    return Table(("arm", "method", "position", "settings", "seeds"), tuple(rows))


def _side_by_side(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [(name, *(_cell(column.get(name)) for column in columns.values())) for name in names]
    return Table(("", *columns), tuple(row for row in rows if any(cell != "–" for cell in row[1:])))


def _cell(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value)
    return str(value)


def _span(layers: list[int]) -> str:
    """1, 3-5."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
