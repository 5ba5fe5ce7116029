"""A comparison on a terminal: a line an arm, the best first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lesa_ray.comparison.curves import Axis, reached
from lesa_ray.comparison.statistics import finals, spread
from lesa_ray.report.terminal import count, duration


def comparison_table(content: Mapping[str, Any]) -> Table:
    """content: of `comparison.json`. Arms in the order of their final losses; controls in italics. Tokens and time are
    those until a run is where the reference's run of the same seed ended; `tuned` is the loss on conversations."""
    title = "Loss on held-out rows, nats a token, before and after training"
    table = Table(box=None, padding=(0, 2), header_style="dim", title=title, title_justify="left")
    table.add_column("arm", overflow="fold")
    tuned = any(run["tuned_loss"] is not None for arm in content["arms"] for run in arm["runs"])
    columns = ("layers", "parameters", "trained", "before", "after", "±", "tokens to ref.", "time to ref.")
    for name in (*columns, *(["tuned"] if tuned else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs", overflow="fold")
    targets = next((finals(arm) for arm in content["arms"] if arm["name"] == content["reference"]), {})
    for arm in sorted(content["arms"], key=_rank):
        found = spread(list(finals(arm).values()))
        tokens, seconds = (_reached(arm, targets, axis) for axis in ("tokens", "seconds"))
        table.add_row(
            arm["name"],
            str(arm["layers"]),
            count(arm["parameters"]),
            f"{100 * arm['trained_parameters'] / arm['parameters']:.0f} %",
            _mean(arm, "loss_before"),
            _loss(found.mean if found else None),
            _loss(found.sd if found else None),
            tokens if isinstance(tokens, str) else f"{tokens:,.0f}",
            "–" if isinstance(seconds, str) else duration(seconds),
            *([_mean(arm, "tuned_loss")] if tuned else []),
            _runs(arm),
            style="italic" if arm["control"] else None,
        )
    return table


def reading(content: Mapping[str, Any]) -> list[str]:
    """What the table says and what it does not, a line each. Runs of one seed had their data in the same order, so
    their differences are looked at seed by seed."""
    ranked = [arm for arm in sorted(content["arms"], key=_rank) if finals(arm)]
    lines = [f"ref.: {content['reference']}, with the same seed"]
    if len(ranked) > 1:
        first, second = ranked[:2]
        mine, others = finals(first), finals(second)
        gaps = [others[seed] - mine[seed] for seed in mine if seed in others]
        said = f"{first['name']} ends lowest, before {second['name']}"
        if not gaps:
            lines.append(f"{said}; they have no seed in common")
        elif len(gaps) == 1:
            lines.append(f"{said} by {gaps[0]:.4f} with one seed; whether another would say the same is not known")
        else:
            between = f"{statistics.fmean(gaps):.4f} ({min(gaps):.4f} to {max(gaps):.4f} with {len(gaps)} seeds)"
            finding = "" if min(gaps) > 0 else ": not with every seed, so not a finding"
            lines.append(f"{said} by {between}{finding}")
    controls = [arm for arm in ranked if arm["control"]]
    if controls and not ranked[0]["control"]:
        lines.append(f"the best control is {controls[0]['name']}, {_loss(_rank(controls[0]))}")
    return [*lines, *content["remarks"], *content["notes"]]


def _rank(arm: Mapping[str, Any]) -> float:
    """The mean of the final losses; infinite where there is none."""
    losses = finals(arm).values()
    return statistics.fmean(losses) if losses else math.inf


def _reached(arm: Mapping[str, Any], losses: Mapping[int, float], axis: Axis) -> float | str:
    """Mean over an arm's runs, if all of them came to the loss of their seed; else how many did."""
    found = [reached(arm, run, losses[run["seed"]], axis) for run in arm["runs"] if run["seed"] in losses
             and run["curve"]]  # fmt: skip
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


def _mean(arm: Mapping[str, Any], name: str) -> str:
    """Of a loss, over the runs that have it."""
    found = [run[name] for run in arm["runs"] if run[name] is not None]
    return _loss(statistics.fmean(found) if found else None)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
