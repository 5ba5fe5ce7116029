"""Sections → the page's HTML: figures as inline SVG, one file, no clock, so the same RUNs give the same page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lesa_ray import __version__
from lesa_ray.report.page.compared import with_untrained
from lesa_ray.report.page.figure import Figure, svgs, swatch
from lesa_ray.report.page.ranking import verdict
from lesa_ray.report.page.sections import Section, labels
from lesa_ray.report.page.sources import Material
from lesa_ray.report.page.style import STYLE
from lesa_ray.report.page.template import MACROS, PAGE
from lesa_ray.report.page.words import listed, plural, some

GENERATOR = "lesa-ray report"
_PIXELS = 118
"""Pixels of the page for an inch of a figure, at most: 8.5 points are then 14 pixels."""
_MANY = 4
"""Figures of more panels than this are printed three in a row."""


def render(material: Material, sections: Sequence[Section], missing: Sequence[str], *, images: bool) -> str:
    """The page. images: whether PNGs lie beside it, to be linked."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html: str = environment.from_string(MACROS + PAGE).render(
        generator=GENERATOR,
        title=_title(material),
        facts=_facts(material),
        style=Markup(STYLE),
        verdict=[(one.name, verdict(with_untrained(one))) for _, one in material.comparisons],
        missing=missing,
        sections=[_section(section) for section in sections],
        images=images,
        footer=f"Made by lesa-ray {__version__} with matplotlib {_version('matplotlib')}.",
    )
    return html


def _section(section: Section) -> dict[str, Any]:
    return {
        "anchor": section.anchor,
        "title": section.title,
        "texts": section.texts,
        "commands": section.commands,
        "tables": section.tables,
        "figures": [_figure(figure) for figure in section.figures],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "name": figure.name,
        "title": figure.title,
        "see": figure.see,
        "how": figure.how,
        "many": len(figure.panels) > _MANY,
        "legend": [(entry.label, Markup(swatch(entry))) for entry in figure.legend],
        "panels": [Markup(svg) for svg in svgs(figure)],  # matplotlib escapes its text
        "width": round(max(panel.width for panel in figure.panels) * _PIXELS),
        "table": figure.table,
    }


def _title(material: Material) -> str:
    if material.comparisons:
        return f"{listed([one.name for _, one in material.comparisons])}: which expansion is worth it?"
    if material.expansions:
        return f"{some([one.label for one in material.expansions], 3)}: how the new layers were made"
    if material.analyses:
        return f"{some([label for label, _ in labels(material.analyses)], 3)}: what the weights look like"
    return f"{some([one.label for one in material.trainings], 3)}: training"


def _facts(material: Material) -> str:
    analyses = len(material.analyses)
    counts = (
        (material.comparisons, "comparison"),
        (material.expansions, "expansion"),
        (material.trainings, "training run"),
    )
    said = [plural(len(found), noun) for found, noun in counts if found]
    said += [f"{analyses} analyses" if analyses > 1 else "1 analysis"] if analyses else []
    return f"Made from {listed(said)}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
