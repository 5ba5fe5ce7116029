"""A comparison on a terminal: a line an arm, the best first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lesa_ray.comparison.arms import listed
from lesa_ray.comparison.curves import Axis, reached
from lesa_ray.comparison.statistics import UNTRAINED, finals, paired, pairs, spread, unbeaten, untrained, whole
from lesa_ray.report.terminal import count, duration


def comparison_table(content: Mapping[str, Any]) -> Table:
    """content: of `comparison.json`. Arms in the order of their final losses, then those that lack a seed, then those
    without any; controls in italics, the untrained base among them. Tokens and time are those until a run is where the
    reference's run of the same seed ended; `tuned` is the loss on conversations."""
    title = "Loss on held-out rows, nats a token, before and after training"
    table = Table(box=None, padding=(0, 2), header_style="dim", title=title, title_justify="left")
    table.add_column("arm", overflow="fold")
    tuned = any(run["tuned_loss"] is not None for arm in content["arms"] for run in arm["runs"])
    columns = ("layers", "parameters", "trained", "before", "after", "SD", "tokens to ref.", "time to ref.")
    for name in (*columns, *(["tuned"] if tuned else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs", overflow="fold")
    targets = next((finals(arm) for arm in content["arms"] if arm["name"] == content["reference"]), {})
    shown = [arm for arm in content["arms"] if finals(arm)] + untrained(content)
    ranked = _ranked(content)
    short = sorted((arm for arm in shown if arm not in ranked), key=_rank)
    for arm in [*ranked, *short, *(arm for arm in content["arms"] if not finals(arm))]:
        if arm["name"] == UNTRAINED:
            base, loss = content["base"], _loss(_rank(arm))
            cells = [UNTRAINED, str(base["layers"]), count(base["parameters"]), "–", loss, loss]
            table.add_row(*cells, *["–"] * (len(table.columns) - len(cells)), style="italic")
            continue
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
    """What the table says and what it does not, a line each; see `lesa_ray.comparison.statistics` for the rule."""
    ranked = _ranked(content)
    losses = {arm["name"]: finals(arm) for arm in ranked}
    short = [arm["name"] for arm in content["arms"] if finals(arm) and arm["name"] not in losses]
    lines = [f"ref.: {content['reference']}, with the same seed"]
    if len(ranked) > 1:
        first, second = list(losses)[:2]
        found = paired(losses[second], losses[first], pairs(len(ranked)))
        assert found is not None, "they have all seeds"
        said = f"{first} ends lowest, before {second}"
        if found.half is None:
            lines.append(f"{said} by {found.mean:.4f} with one seed; whether another would say the same is not known")
        else:
            finding = "" if found.clear else ": not told apart, so not a finding"
            lines.append(
                f"{said} by {found.mean:.4f} ± {found.half:.4f} (95 % over {found.n} seeds, for all pairs){finding}"
            )
    if short:
        lines.append(f"not ranked, a seed that others have is lacking: {listed(short)}")
    return [*lines, *_beside_controls(ranked), *content["remarks"], *content["notes"]]


def _beside_controls(ranked: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the methods stand to the controls. ranked: arms with results, the best first."""
    controls = {arm["name"]: finals(arm) for arm in ranked if arm["control"]}
    missed = {arm["name"]: unbeaten(finals(arm), controls) for arm in ranked if not arm["control"]}
    if not controls or not missed:
        return []
    best, method = next(iter(controls)), next(iter(missed))
    lines = [f"the best control is {best}, {_loss(statistics.fmean(controls[best].values()))}"]
    if max(len(finals(arm)) for arm in ranked) == 1:
        return [*lines, "with one seed no method is told apart from a control"]
    lines.append(f"controls that {method} does not clearly end below: {listed(missed[method])}")
    clear = [name for name in missed if not missed[name]]
    lines.append(f"methods clearly below every control, each by its own interval: {listed(clear)}")
    if UNTRAINED in controls:
        short = [name for name, found in missed.items() if UNTRAINED in found]
        return [*lines, f"methods not clearly below the untrained base: {listed(short)}"]
    return [*lines, "the untrained base's loss is not known: no control here trains the base"]


def _ranked(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Arms with a final loss with every seed that any has, the untrained base among them; the best first."""
    arms = [*content["arms"], *untrained(content)]
    there = whole({arm["name"]: finals(arm) for arm in arms})
    return sorted((arm for arm in arms if arm["name"] in there), key=_rank)


def _rank(arm: Mapping[str, Any]) -> float:
    """The mean of the final losses; infinite where there is none."""
    losses = finals(arm).values()
    return statistics.fmean(losses) if losses else math.inf


def _reached(arm: Mapping[str, Any], losses: Mapping[int, float], axis: Axis) -> float | str:
    """Mean over an arm's runs that ended, if all of them came to the loss of their seed; else how many did."""
    ended = [run for run in arm["runs"] if run["final_loss"] is not None and run["seed"] in losses]
    found = [reached(arm, run, losses[run["seed"]], axis) for run in ended]
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
