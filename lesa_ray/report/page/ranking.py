"""Which arm did best, and how far that can be believed: in sentences, and as a table."""

from __future__ import annotations

from lesa_ray.comparison.statistics import UNTRAINED, Spread, paired, pairs, quantile, spread, unbeaten, whole
from lesa_ray.report.page.compared import ArmView, ranked, unranked
from lesa_ray.report.page.figure import Table
from lesa_ray.report.page.words import (
    big,
    called,
    difference_words,
    listed,
    percent,
    plural,
    some,
    spread_words,
)


def verdict(arms: list[ArmView]) -> list[str]:
    """What the final losses say, in sentences: the best, what is not told apart from it, what is not ranked, and the
    controls. arms: the untrained base among them."""
    order, short = ranked(arms), [view.name for view, _ in unranked(arms)]
    if all(view.untrained for view, _ in order):
        return [
            f"No {'arm has every seed that others have' if short else 'run is complete'}, so there is no ranking yet."
        ]
    best, final = order[0]
    said = [
        f"{best.called} has the lowest held-out loss at the end, in nats a token: {spread_words(final)}, "
        f"{'no training' if best.untrained else plural(final.n, 'seed')}."
    ]
    if short:
        said.append(
            f"{some(short)} {'is' if len(short) == 1 else 'are'} not ranked: a seed that others have is lacking."
        )
    if final.n == 1:
        said.append("There is one seed: no spread is known, and the order of the arms is not a finding.")
        return said + _controls_in_words(arms, known=False) + _tuned_in_words(arms)
    family = pairs(len(order))
    others = [(view.name, paired(view.finals, best.finals, family)) for view, _ in order[1:]]
    alike = [name for name, found in others if found is None or not found.clear]
    if alike:
        said.append(
            f"{some(alike)} {'is' if len(alike) == 1 else 'are'} not told apart from it: the 95 % interval of the "
            "difference over the seeds includes zero, so which of them is better is not a finding."
        )
    elif others:
        said.append("All others are told apart from it: their differences over the seeds are larger than chance.")
    if len(order) > 2:
        said.append(
            f"As the best was picked from {len(order)} arms, the intervals of the differences to it hold for all pairs "
            f"together (Bonferroni; ±{quantile(final.n - 1, family):.1f} standard errors): were all arms equal, one "
            "would seem to differ from it in less than 5 % of all studies."
        )
    return said + _controls_in_words(arms, known=True) + _tuned_in_words(arms)


def _controls_in_words(arms: list[ArmView], *, known: bool) -> list[str]:
    """How the methods stand to the best control."""
    controls = ranked([view for view in arms if view.arm.control])
    methods = ranked([view for view in arms if not view.arm.control])
    if not controls:
        what = "has every seed" if any(view.arm.control for view in arms) else "is in this comparison"
        return [f"No control {what}, so it does not say whether expanding helped at all."]
    if not methods:
        return []
    best, final = controls[0]
    found = [(view, paired(view.finals, best.finals)) for view, _ in methods]
    if not known:
        below = [view.name for view, difference in found if difference is not None and difference.mean < 0]
        return [
            f"The best control is {best.called}, {spread_words(final)}; "
            f"{f'{some(below)} ended below it' if below else 'no method ended below it'} with this seed."
        ]
    better = [view.name for view, d in found if d is not None and d.clear and d.mean < 0]
    worse = [view.name for view, d in found if d is not None and d.clear and d.mean > 0]
    finals = {view.name: view.finals for view, _ in controls}
    missed = {view.name: unbeaten(view.finals, finals) for view, _ in methods}
    parts = [f"by each method's own 95 % interval clearly better than it: {some(better) if better else 'no method'}"]
    if worse:
        parts.append(f"clearly worse: {some(worse)}")
    rest = len(found) - len(better) - len(worse)
    if rest:
        parts.append(f"not told apart: {rest} of {len(found)}")
    said = [f"The best control is {best.called}, {spread_words(final)}; {'; '.join(parts)}."]
    method = methods[0][0]
    if missed[method.name]:
        said.append(f"{method.called}, the lowest method, is not clearly better than {some(missed[method.name])}.")
    if not any(view.untrained for view in arms):
        said.append("The untrained base's loss is not known: no control here trains the base.")
    elif short := [name for name, found in missed.items() if UNTRAINED in found]:
        said.append(f"Not clearly better than the untrained base: {some(short)}.")
    return said


def _tuned_in_words(arms: list[ArmView]) -> list[str]:
    """Which arm ends lowest once all are fine-tuned, where they are."""
    tuned = {view.name: view.tuned for view in arms}
    found = {name: spread(list(tuned[name].values())) for name in whole(tuned)}
    order = sorted(((name, final) for name, final in found.items() if final is not None), key=lambda one: one[1].mean)
    if not order:
        return []
    best, final = order[0]
    said = f"After fine-tuning {called(best)} has the lowest held-out loss on conversations: {spread_words(final)}"
    rest = {name: paired(tuned[name], tuned[best], pairs(len(order))) for name, _ in order[1:]}
    alike = [name for name, difference in rest.items() if difference is None or not difference.clear]
    if final.n == 1:
        said += "; with one seed that is no finding"
    elif rest:
        said += f"; not told apart from it: {some(alike)}" if alike else "; all others are told apart from it"
    return [f"{said}."]


def ranking_table(arms: list[ArmView]) -> Table:
    """All arms, the best first; then those that lack a seed, and those without a result."""
    order = ranked(arms)
    best, family = order[0][0] if order else None, pairs(len(order))
    there = [*order, *unranked(arms), *((view, None) for view in arms if view.final is None)]
    tuned = any(view.tuned for view in arms)
    columns = (
        "arm",
        "final loss",
        "Δ to the best",
        "seeds",
        "right after expansion",
        "layers",
        "parameters",
        "trained",
        *(["loss after fine-tuning"] if tuned else []),
    )
    rows = [(*_row(view, final, best, family), *([_known(view.tuned)] if tuned else [])) for view, final in there]
    return Table(columns, tuple(rows))


def _known(losses: dict[int, float]) -> str:
    found = spread(list(losses.values()))
    return "–" if found is None else spread_words(found)


def _row(view: ArmView, final: Spread | None, best: ArmView | None, family: int) -> tuple[str, ...]:
    arm = view.arm
    trained = arm.trained_parameters / arm.parameters if arm.trained_parameters and arm.parameters else None
    return (
        arm.name + (" (control)" if arm.control else ""),
        "–" if final is None else spread_words(final),
        _to_best(view, best, family) if final is not None else _why_none(view),
        "–" if view.untrained else f"{len(view.finals)} of {len(arm.runs)}",
        _known(view.before) + (" (new layers not yet in)" if view.before and arm.inserted_tokens else ""),
        "–" if arm.layers is None else str(arm.layers),
        "–" if arm.parameters is None else big(arm.parameters),
        "–" if trained is None else percent(trained),
    )


def _to_best(view: ArmView, best: ArmView | None, family: int) -> str:
    if view is best:
        return "the best"
    found = None if best is None else paired(view.finals, best.finals, family)
    if found is None:
        return "no common seed"
    parts = [] if view.whole else ["not ranked"]
    parts += ["one seed"] if found.half is None else [] if found.clear else ["not told apart"]
    return ", ".join([difference_words(found), *parts])


def _why_none(view: ArmView) -> str:
    states = sorted({"no finite loss" if one.status == "complete" else one.status for one in view.arm.runs})
    return listed(states) if states else "no run"
