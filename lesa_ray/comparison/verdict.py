"""What the comparisons of a study say together.

Decides
- The untrained base is a control like the others: a method that does not end below it has gained nothing by growing and
  training. Its loss has no seed, so the interval of a difference to it is that of the arm's own final losses.
- Within a base two arms are compared seed by seed (`lesa_ray.comparison.statistics.paired`). Over bases, which may be
  as different as code and prose, a base counts once: an arm is better than another only if it is so on every base, by
  more than the 95 % interval over the seeds. What is less than that is called not told apart. Intervals beside the best
  method allow for its having been picked; those beside controls are each its own.
- An arm that lacks a seed on some base is told and not ranked, nor is it the yardstick.
- The best method is the one with the lowest mean difference to the best control; with it stand all arms, controls too,
  that it does not beat so. Sums of wins would let one base with small noise outvote the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lesa_ray.comparison.arms import listed
from lesa_ray.comparison.statistics import UNTRAINED, finals, paired, pairs, unbeaten, untrained, whole
from lesa_ray.comparison.study_settings import StudyConfig
from lesa_ray.errors import UserError


@dataclass(frozen=True)
class OnBase:
    """One arm on one base, beside the yardstick; losses in nats a token."""

    before: float | None
    """Held-out loss right after expansion, less the base's own; mean over seeds."""
    difference: float
    """Final held-out loss less the yardstick's; mean over seeds."""
    half: float | None
    """Half of the 95 % interval of `difference`; None with one seed."""
    seeds: int
    unbeaten: tuple[str, ...]
    """Controls, itself apart, below which it does not end by more than the interval."""


@dataclass(frozen=True)
class ArmSummary:
    """One arm over all bases."""

    name: str
    control: bool
    difference: float
    """Mean over bases of the differences to the yardstick."""
    unbeaten: tuple[str, ...]
    """Controls, itself apart, that it does not beat on every base by more than the interval over seeds."""
    bases: dict[str, OnBase]


@dataclass(frozen=True)
class Verdict:
    """What the bases say together."""

    yardstick: str
    """The control with the lowest mean final loss over the bases."""
    arms: tuple[ArmSummary, ...]
    """Those that on every base have a result with every seed with which any arm has one there; the best first."""
    best: str | None
    """The method with the lowest mean difference; None where there is none."""
    alike: tuple[str, ...]
    """Arms, controls among them, that it does not beat on every base by more than the interval for all pairs."""
    incomplete: tuple[str, ...]
    """All other arms."""


Finals = dict[str, dict[int, float]]
"""Arm → seed → final held-out loss."""


def verdict(comparisons: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """comparisons: base → the content of its `comparison.json`. Raises: UserError where no control is complete."""
    arms = {base: [*content["arms"], *untrained(content)] for base, content in comparisons.items()}
    losses = {base: {arm["name"]: finals(arm) for arm in there} for base, there in arms.items()}
    names = list(dict.fromkeys(arm["name"] for there in arms.values() for arm in there))
    controls = {arm["name"] for there in arms.values() for arm in there if arm["control"]}
    there = [whole(of_base) for of_base in losses.values()]
    complete = [name for name in names if all(name in ended for ended in there)]
    means = {name: fmean(fmean(of_base[name].values()) for of_base in losses.values()) for name in complete}
    yardstick = min((name for name in complete if name in controls), key=means.__getitem__, default=None)
    if yardstick is None:
        raise UserError("no control has results with every seed on every base: there is nothing to measure the arms by")
    found = []
    for name in complete:
        others = [control for control in complete if control in controls and control != name]
        runs = {base: next(arm["runs"] for arm in arms[base] if arm["name"] == name) for base in arms}
        on = {
            base: _on_base(runs[base], comparisons[base]["base"]["loss"], of, name, yardstick, others)
            for base, of in losses.items()
        }
        missed = tuple(other for other in others if any(other in one.unbeaten for one in on.values()))
        found.append(ArmSummary(name, name in controls, fmean(one.difference for one in on.values()), missed, on))
    found.sort(key=lambda arm: arm.difference)
    best = next((arm.name for arm in found if not arm.control), None)
    family = pairs(len(found))
    rest = [] if best is None else [arm.name for arm in found if arm.name != best]
    alike = [name for name in rest if best is not None and not beats(losses, best, name, family)]
    return Verdict(yardstick, tuple(found), best, tuple(alike), tuple(n for n in names if n not in complete))


def beats(losses: Mapping[str, Finals], one: str, other: str, family: int) -> bool:
    """Whether an arm ends below another on every base, by more than the 95 % interval over the seeds."""
    return not any(unbeaten(of[one], {other: of[other]}, family) for of in losses.values())


def _on_base(
    runs: Sequence[Mapping[str, Any]],
    base: float | None,
    losses: Finals,
    name: str,
    yardstick: str,
    controls: Iterable[str],
) -> OnBase:
    """runs: the arm's. base: the untrained base's loss."""
    found = paired(losses[name], losses[yardstick])
    assert found is not None, "they have a seed in common"
    starts = [run["loss_before"] for run in runs if run["loss_before"] is not None]
    before = fmean(starts) - base if starts and base is not None else None
    missed = unbeaten(losses[name], {control: losses[control] for control in controls})
    return OnBase(before, found.mean, found.half, found.n, tuple(missed))


def reading(found: Verdict) -> list[str]:
    """What the figures say, a line each."""
    methods = [arm for arm in found.arms if not arm.control]
    if not methods:
        return ["No method has results with every seed on every base yet."]
    best, many = methods[0], len(methods[0].bases)
    lines = [
        f"{best.name} ends lowest of the methods, {best.difference:+.4f} nats from the best control, "
        f"{found.yardstick}, in the mean over {many} {'base' if many == 1 else 'bases'}."
    ]
    if all(one.half is None for one in best.bases.values()):
        lines.append("There is one seed: no spread is known, nothing is told apart, and the order is not a finding.")
    alike = [arm.name for arm in methods if arm.name in found.alike]
    lines.append(f"Methods not told apart from it on every base, by intervals for all pairs: {listed(alike)}.")
    lines.append(
        f"Controls that it does not clearly beat on every base, each by its own interval: {listed(best.unbeaten)}."
    )
    for base, one in best.bases.items():
        clear = [arm.name for arm in methods if not arm.bases[base].unbeaten]
        lines.append(
            f"On {base} it does not clearly beat: {listed(one.unbeaten)}. Methods that clearly beat every control "
            f"there: {listed(clear)}."
        )
    clear = [arm.name for arm in methods if not arm.unbeaten]
    lines.append(f"Methods that clearly beat every control on every base: {listed(clear)}.")
    if any(arm.name == UNTRAINED for arm in found.arms):
        short = [arm.name for arm in methods if UNTRAINED in arm.unbeaten]
        lines.append(f"Methods that do not clearly beat the untrained base on every base: {listed(short)}.")
    else:
        lines.append("The untrained base's loss is not known on every base: it is measured where the base is trained.")
    if found.incomplete:
        lines.append(f"Not ranked, without a result with every seed on every base: {listed(found.incomplete)}.")
    return lines


def to_json(
    config: StudyConfig,
    comparisons: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, str],
    missing: Sequence[str],
) -> dict[str, Any]:
    """Everything, as it is written to results.json. places: base → where its comparison lies; missing: what of it
    failed, a line each."""
    found = verdict(comparisons)
    return {
        "kind": "study",
        "settings": config.model_dump(mode="json"),
        "comparisons": dict(places),
        "machine": next(iter(comparisons.values()))["machine"],
        "verdict": asdict(found),
        "reading": reading(found),
        "missing": list(missing),
    }
