"""The plan of an expansion as a picture.

A plan is drawn as the network is usually drawn, a stack with the embedding below and the head above, one column an
expansion: 48 layers are then tall, not wide, and several plans stand side by side on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesa_ray.config import ExpandConfig
from lesa_ray.report.page.commands import command
from lesa_ray.report.page.figure import Entry, Figure, Panel
from lesa_ray.report.page.palette import AXIS, INK, MUTED, NEW, ON_FILL, SERIES, Stroke
from lesa_ray.report.page.sources import Expansion
from lesa_ray.report.page.words import plural, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STACKS = 8
"""Plans in one panel."""
_NAME = 10
"""Characters of a line of a plan's name: as wide as its column."""


def plan_figure(expansions: Sequence[Expansion]) -> Figure | None:
    """Which layers are old, copied and new. Plans that are alike share a column."""
    plans = _distinct_plans(expansions)
    if not plans:
        return None
    groups = [plans[at : at + _STACKS] for at in range(0, len(plans), _STACKS)]
    labels, one = plans[0]
    layers, new = one.manifest["layers"], one.manifest["new_layers"]
    old = len(layers) - len(new)
    copied = all(layer["kind"] != "new" for layer in layers)
    added = f"{len(new)} {'copied' if copied else 'new'}"
    see = f"{some(labels, 4)}: {old} → {len(layers)} layers, {added}"
    see += f", all above layer {new[0] - 1} of the result" if new and new[0] >= old / 2 else ", spread over the depth"
    if len(plans) > 1:
        see += f"; {plural(len(plans), 'different plan')} in all"
    kinds = {layer["kind"] for _, plan in plans for layer in plan.manifest["layers"]}
    entries = [Entry("old layer", Stroke(MUTED, "s"), line=False, filled=False)]
    if "new" in kinds:
        entries.append(Entry("new layer", Stroke(NEW, "s"), line=False))
    if "copy" in kinds:
        entries.append(Entry("copy of an old layer", Stroke(SERIES[0], "s"), line=False))
    return Figure(
        "plan",
        "The plan: which layers are old and which are new",
        see + ". Layer 0 is next to the embedding.",
        how_expand(one),
        tuple(_plan_panel(group) for group in groups),
        tuple(entries),
    )


def how_expand(expansion: Expansion) -> str:
    """The command that makes the expansion again, with the settings that are not the defaults."""
    manifest = expansion.manifest
    words = ["lesa-ray", "expand", manifest["base"], expansion.label.replace(" ", "-"), "--method", manifest["method"]]
    settings = manifest.get("identity", {}).get("settings", {})
    if str(settings.get("position")).endswith("-important"):
        settings = {**settings, "importance": "ANALYSIS"}
    unused = () if "lesa" in manifest["method"] else ("lesa",)
    return command(words, ExpandConfig, settings, {"base", "out", "method", *unused})


def _distinct_plans(expansions: Sequence[Expansion]) -> list[tuple[list[str], Expansion]]:
    found: dict[tuple[Any, ...], tuple[list[str], Expansion]] = {}
    for expansion in expansions:
        key = tuple((one["kind"], *one["base_layers"]) for one in expansion.manifest["layers"])
        found.setdefault(key, ([], expansion))[0].append(expansion.label)
    return list(found.values())


def _plan_panel(group: list[tuple[list[str], Expansion]]) -> Panel:
    most = max(len(one.manifest["layers"]) for _, one in group)
    cell = max(0.07, min(0.2, 6.0 / most))
    labelled = cell >= 0.115

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        colours = {"new": NEW, "copy": SERIES[0]}
        for column, (_, one) in enumerate(group):
            for layer in one.manifest["layers"]:
                at, kind = layer["index"], layer["kind"]
                colour = colours.get(kind)
                axes.add_patch(
                    Rectangle(
                        (column - 0.38, at - 0.42),
                        0.76,
                        0.84,
                        facecolor=colour or "none",
                        alpha=0.85 if colour else 1,
                        edgecolor=colour or AXIS,
                        linewidth=0.7,
                    )
                )
                if labelled:
                    text = "|".join(map(str, layer["base_layers"]))
                    axes.text(
                        column,
                        at,
                        text,
                        ha="center",
                        va="center_baseline",
                        fontsize=min(7.5, 44 * cell),
                        color=ON_FILL if colour else INK,
                    )
        axes.set_xlim(-0.6, max(len(group), 3) - 0.4)
        axes.set_ylim(-0.7, most - 0.3)
        names = [_short_names(labels) for labels, _ in group]
        axes.set_xticks(
            range(len(group)), names, rotation=0 if len(group) < 4 else 35, ha="center" if len(group) < 4 else "right"
        )
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.set_ylabel("layer of the result")
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    return Panel("", draw, width=max(2.6, min(5.6, 0.8 + 0.78 * len(group))), height=0.9 + cell * most)


def _short_names(labels: Sequence[str]) -> str:
    import textwrap

    text = labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
    return "\n".join(textwrap.wrap(text, _NAME))
