"""A comparison on a terminal: a line an arm, the best first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lesa_ray.comparison.collect import final_loss
from lesa_ray.comparison.curves import Axis, reached
from lesa_ray.report.terminal import count, duration


def comparison_table(content: Mapping[str, Any]) -> Table:
    """content: of `comparison.json`. Arms in the order of their final losses; controls in italics."""
    target = _target(content)
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("arm", overflow="fold")
    columns = ["layers", "parameters", "trained", "loss before", "final loss", "±"]
    if target is not None:
        columns += [f"tokens to {target:.4f}", "time to it"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs", overflow="fold")

    def rank(arm: Mapping[str, Any]) -> float:
        found = final_loss(arm)
        return float("inf") if found is None else found[0]

    for arm in sorted(content["arms"], key=rank):
        found = final_loss(arm)
        mean, spread = (found[0], found[1]) if found else (None, None)
        before = [run["loss_before"] for run in arm["runs"] if run["loss_before"] is not None]
        cells = [
            str(arm["layers"]),
            count(arm["parameters"]),
            f"{100 * arm['trained_parameters'] / arm['parameters']:.0f} %",
            _loss(statistics.fmean(before) if before else None),
            _loss(mean),
            "–" if spread is None else f"{spread:.4f}",
        ]
        if target is not None:
            tokens, seconds = (_reached(arm, target, axis) for axis in ("tokens", "seconds"))
            cells += [tokens if isinstance(tokens, str) else f"{tokens:,.0f}"]
            cells += ["–" if isinstance(seconds, str) else duration(seconds)]
        table.add_row(arm["name"], *cells, _runs(arm), style="italic" if arm["control"] else None)
    return table


def reading(content: Mapping[str, Any]) -> list[str]:
    """What the table says and what it does not, a line each."""
    lines = []
    known = [(arm, found) for arm in content["arms"] if (found := final_loss(arm)) is not None]
    ranked = sorted(known, key=lambda one: one[1][0])
    if len(ranked) > 1:
        (first, best), (second, next_) = ranked[:2]
        gap = next_[0] - best[0]
        spreads = [spread for _, (_, spread, _) in ranked[:2] if spread is not None]
        said = f"{first['name']} ends lowest, {gap:.4f} below {second['name']}"
        if len(spreads) < 2:
            lines.append(f"{said}; with one seed it is not known whether another would say the same")
        elif gap <= max(spreads):
            lines.append(f"{said}: no more than seeds differ ({max(spreads):.4f}), so not a finding")
        else:
            lines.append(f"{said}; seeds differ by {max(spreads):.4f} (standard deviation)")
    controls = [(arm["name"], found[0]) for arm, found in ranked if arm["control"]]
    if controls and not ranked[0][0]["control"]:
        lines.append(f"the best control is {controls[0][0]}, {controls[0][1]:.4f}")
    lines += content["notes"]
    return lines


def _target(content: Mapping[str, Any]) -> float | None:
    """The reference's final loss."""
    found = [final_loss(arm) for arm in content["arms"] if arm["name"] == content["reference"]]
    return found[0][0] if found and found[0] is not None else None


def _reached(arm: Mapping[str, Any], loss: float, axis: Axis) -> float | str:
    """Mean over an arm's runs, if all of them came so far; else how many did."""
    found = [reached(run["curve"], loss, axis) for run in arm["runs"] if run["curve"]]
    there = [one for one in found if one is not None]
    if not found:
        return "–"
    if len(there) < len(found):
        return "not reached" if not there else f"in {len(there)} of {len(found)}"
    return statistics.fmean(there)


def _runs(arm: Mapping[str, Any]) -> str:
    """How many runs are complete, and what stopped the others."""
    complete = sum(run["status"] == "complete" for run in arm["runs"])
    problems = [f"seed {run['seed']}: {run['problem']}" for run in arm["runs"] if run["problem"]]
    return "; ".join([f"{complete} of {len(arm['runs'])}", *problems])


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
