"""Which figures the page has, in which order, and what it says is missing.

A figure whose data are not there is left out, and a sentence says what was missing and, where there is one, the command
that would give it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lesa_ray.report.page import (
    curves,
    fit,
    likeness,
    losses,
    pictures,
    plans,
    ranking,
    residual,
    spectra,
    tasks,
    weights,
)
from lesa_ray.report.page.compared import views, with_untrained
from lesa_ray.report.page.figure import Figure, Table
from lesa_ray.report.page.schema import Analysis, Comparison, Trial
from lesa_ray.report.page.settings import settings_tables
from lesa_ray.report.page.sources import Expansion, Material, short_name
from lesa_ray.report.page.trained import training_figure
from lesa_ray.report.page.words import big, called, listed, plural, short_type, some


@dataclass
class Section:
    """A heading with what stands below it. tables: with their captions."""

    anchor: str
    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def add(self, figure: Figure | None) -> None:
        """Add a figure, if there is one."""
        if figure is not None:
            self.figures.append(figure)


def make_sections(material: Material, command: str) -> tuple[list[Section], list[str]]:
    """All sections that hold something, and what is missing. command: what makes the page.

    A page of analyses alone is about weights: it does not miss what it is not about."""
    about_weights = bool(material.analyses) and not (material.comparisons or material.expansions or material.trainings)
    missing = list(material.missing)
    sections = [_comparison(comparison, number, missing) for number, (_, comparison) in enumerate(material.comparisons)]
    if not material.comparisons and not about_weights:
        missing.append("Which method is best here: no comparison was given; `lesa-ray compare FILE` makes one.")
    training = Section("training-runs", "Training runs")
    training.add(training_figure(material.trainings))
    sections += [training, _plan_and_fit(material, missing), *_weights(material, missing)]
    settings = Section(
        "settings", "Settings, versions, and how to make this page again", tables=settings_tables(material)
    )
    settings.commands = [command]
    sections.append(settings)
    _tell_twins_apart(sections)
    return [one for one in sections if one.figures or one.tables or one.texts or one.commands], missing


def labels(analyses: Sequence[tuple[str, Analysis]]) -> list[tuple[str, Analysis]]:
    """A short name for each, with its number where two are alike."""
    names = [short_name(one.checkpoint) for _, one in analyses]
    return [
        (name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})", one)
        for at, (name, (_, one)) in enumerate(zip(names, analyses, strict=True))
    ]


def _comparison(comparison: Comparison, number: int, missing: list[str]) -> Section:
    arms, beside = views(comparison), with_untrained(comparison)
    texts = [_setting(comparison), *(f"{remark}." for remark in comparison.remarks)]
    section = Section(f"comparison-{number}", f"Comparison: {comparison.name}", texts)
    caption = (
        "All arms, the lowest final held-out loss (nats a token; mean, SD: standard deviation over the seeds) first; "
        "±: the 95 % interval for all pairs of arms"
    )
    section.tables = [(caption, ranking.ranking_table(beside))]
    nothing = "no run has the figures for it"
    made = (
        ("Final losses", nothing, losses.final_figure(comparison, beside)),
        ("The loss right after expansion", nothing, losses.before_figure(comparison, arms)),
        ("Loss curves", nothing, curves.curves_figure(comparison, arms)),
        (
            "Cost at equal loss",
            "the reference did not improve, or no arm beside it has a curve",
            curves.saving_figure(comparison, arms),
        ),
        ("Tokens to given losses", nothing, curves.reached_figure(comparison, arms)),
        (
            "Downstream tasks",
            "the comparison measured none (`tasks:` in its file)",
            tasks.tasks_figure(comparison, arms),
        ),
    )
    for what, why, figure in made:
        section.add(figure)
        if figure is None:
            missing.append(f"{what} ({comparison.name}): {why}.")
    section.add(tasks.published_figure(comparison, arms))
    missing += _problems(comparison)
    return section


def _setting(comparison: Comparison) -> str:
    """What all arms have in common, in a sentence or two."""
    base, data, machine = comparison.base, comparison.data, comparison.machine
    said = f"All arms start from {short_name(base.checkpoint)}"
    if base.parameters and base.layers:
        said += f" ({big(base.parameters)} parameters, {plural(base.layers, 'layer')})"
    said += " and train on the same data"
    if comparison.tokens:
        said += f", {big(comparison.tokens)} tokens each (a control of equal compute takes as many FLOPs instead)"
    if data.heldout_rows and data.seq_len:
        said += f"; the loss is over {plural(data.heldout_rows, 'held-out row')} of {data.seq_len:,} tokens"
    if comparison.settings.get("finetune"):
        said += "; every run is fine-tuned afterwards, of which its curve and final loss say nothing"
    on = [machine.device] if machine.device else []
    on += [f"{machine.cpus:g} CPUs"] if machine.cpus else []
    when = f" on {machine.when[:10]}" if machine.when else ""
    return f"{said}. The runs made last had {listed(on)}{when}." if on else f"{said}."  # of the others it is not known


def _problems(comparison: Comparison) -> list[str]:
    """What did not run, and what cannot be said for that reason."""
    told = [f"{note} ({comparison.name})" for note in comparison.notes]
    for arm in comparison.arms:
        seeds: dict[str, list[str]] = {}
        for trial in arm.runs:
            if (problem := _problem(trial)) is not None:
                seeds.setdefault(problem, []).append(str(trial.seed))
        for problem, found in seeds.items():
            which = f"{'seed' if len(found) == 1 else 'seeds'} {listed(found)}"
            told.append(f"{called(arm.name)}, {which} ({comparison.name}): {problem}")
        if not arm.runs:
            told.append(f"{arm.name} ({comparison.name}): has no run")
    counts = {len(view.finals) for view in views(comparison) if view.finals}
    if counts == {1}:
        told.append(f"A spread over seeds ({comparison.name}): every arm has one")
    return [text if text.endswith(".") else f"{text}." for text in told]


def _problem(trial: Trial) -> str | None:
    """What is wrong with a run, None if nothing is."""
    if trial.status != "complete":
        return trial.status + (f": {' '.join(trial.problem.split())[:300]}" if trial.problem else "")
    if trial.final_loss is None:
        return "its final loss is not a finite number"
    return None if trial.curve else "its loss curve is empty"


def _plan_and_fit(material: Material, missing: list[str]) -> Section:
    section = Section("expansions", "Plan and fit")
    if not material.expansions and not material.analyses:
        missing.append("The plan and the fit of each weight type: no expanded checkpoint was given.")
    if not material.expansions:
        return section
    section.add(plans.plan_figure(material.expansions))
    without = []
    own = _expansions_once(material)
    for one in own:
        scores, held_out = fit.fit_scores(one)
        reports = [report for report in one.manifest["fit"].values() if isinstance(report, dict)]
        ridge = any(report.get("predictor") == "ridge" for report in reports)
        figure = fit.fit_figure(
            scores,
            name=f"fit-{_slug(one.label)}",
            of=one.label,
            how=plans.how_expand(one),
            held_out=held_out,
            predictor="ridge regression" if ridge else "the predictor",
        )
        section.add(figure)
        if figure is None and "lesa" in one.manifest["method"]:
            without.append(one.label)
    if without:
        missing.append(f"The fit of {some(without)}: expansion.json has no scores.")
    section.add(fit.ratios_figure(own))
    return section


def _expansions_once(material: Material) -> list[Expansion]:
    """Expansions without those that are another's again: a trained checkpoint carries its base's manifest."""
    found: dict[str, Expansion] = {}
    for one in sorted(material.expansions, key=lambda one: one.trained):
        found.setdefault(str(one.manifest.get("fingerprint") or one.url), one)
    return [one for one in material.expansions if one in found.values()]


def _weights(material: Material, missing: list[str]) -> list[Section]:
    if not material.analyses:
        missing.append(
            "Spectra, ranks, similarity of layers and their pictures, contributions to the residual stream: no "
            "analysis was given; `lesa-ray analyze CHECKPOINT --out FOLDER` makes one."
        )
        return []
    labelled = labels(material.analyses)
    sections = [
        _analysis(label, analysis, f"-{number + 1}" if number else "", missing)
        for number, (label, analysis) in enumerate(labelled)
    ]
    stream = Section("residual-stream", "The residual stream")
    for number, pair in enumerate(residual.pair_up(labelled)):
        stream.add(residual.residual_figure(pair, f"residual-{number + 1}" if number else "residual"))
        if pair.before.residual is not None and (why := pair.before.residual.unsplit):
            missing.append(f"What attention and MLP of {pair.label} add apart: {why}.")
    lacking = [label for label, one in labelled if one.residual is None or not one.residual.layers]
    if lacking:
        missing.append(
            f"What the layers of {some(lacking)} add to the residual stream: analysed without text; "
            "`lesa-ray analyze … --data BLOCKS` measures it."
        )
    return [*sections, stream]


def _analysis(label: str, analysis: Analysis, suffix: str, missing: list[str]) -> Section:
    section = Section(f"weights{suffix}", f"What the weights look like: {label}")
    held = [plural(analysis.layers, "layer"), plural(len(analysis.types), "weight type")]
    held += [plural(len(analysis.new_layers), "new layer")] if analysis.new_layers else []
    section.texts = [f"{', '.join(held)}; read from the checkpoint, without training."]
    if analysis.new_layers:
        section.texts.append(
            "What is said of neighbours, of the common basis, of the order of layers and of the fit is said of the old "
            "layers alone: a copy is like its source whatever the model."
        )
    if analysis.uneven:
        section.texts.append(f"{analysis.uneven[0].upper()}{analysis.uneven[1:]}.")
    if len(analysis.types) > weights.MOST_TYPES:
        section.texts.append(
            f"The figures show the first {weights.MOST_TYPES} weight types; the others are in analysis.json."
        )
    how = weights.how_analyze(analysis)
    scores, held_out = fit.analysis_scores(analysis)
    fitted = fit.fit_figure(
        scores,
        name=f"analysis-fit{suffix}",
        of=f"{label}, old layers" if analysis.new_layers else label,
        how=how,
        held_out=held_out,
    )
    matched = fit.matched_figure(analysis, label, f"matched{suffix}", how)
    made = (
        ("norms", weights.norms_figure(analysis, label, f"norms{suffix}")),
        ("singular spectra", spectra.spectra_figure(analysis, label, f"spectra{suffix}")),
        ("ranks", spectra.ranks_figure(analysis, label, f"ranks{suffix}")),
        ("what a common basis keeps", spectra.captured_figure(analysis, label, f"captured{suffix}")),
        ("similarity of neighbouring layers", likeness.neighbours_figure(analysis, label, f"neighbours{suffix}")),
        ("the quick fit of the predictors (`--fit`)", fitted),
        ("candidates after matching (`--match`)", matched),
        ("PCA pictures", pictures.picture_figure(analysis, label, f"pca{suffix}", "pca")),
        ("t-SNE pictures", pictures.picture_figure(analysis, label, f"tsne{suffix}", "tsne")),
    )
    for _, figure in made:
        section.add(figure)
    lacking = [what for what, figure in made if figure is None]
    if lacking:
        missing.append(f"Of {label}: {listed(lacking)} (not in its analysis.json).")
    if analysis.fit_missing:
        missing.append(f"Of {label}: the quick fit: {analysis.fit_missing}.")
    if analysis.matched_missing:
        missing.append(f"Of {label}: matched layers: {analysis.matched_missing}.")
    missing += _no_tsne(label, analysis)
    return section


def _no_tsne(label: str, analysis: Analysis) -> list[str]:
    """Why some types, or all, have no t-SNE picture, where the analysis says so."""
    reasons: dict[str, list[str]] = {}
    for name, figures in weights.shown_types(analysis).items():
        if not figures.pictures.tsne and figures.pictures.tsne_missing:
            reasons.setdefault(figures.pictures.tsne_missing, []).append(short_type(name))
    return [f"Of {label}: t-SNE of {some(names)}: {reason}." for reason, names in reasons.items()]


def _tell_twins_apart(sections: Sequence[Section]) -> None:
    """Figures' names are file names and anchors: number those that two sections share."""
    used: dict[str, int] = {}
    for section in sections:
        for at, figure in enumerate(section.figures):
            used[figure.name] = used.get(figure.name, 0) + 1
            if used[figure.name] > 1:
                section.figures[at] = replace(figure, name=f"{figure.name}-{used[figure.name]}")


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.").lower() or "run"
