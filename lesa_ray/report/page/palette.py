"""The colours and strokes of the page, for a light and a dark background.

A figure is drawn once, in the colours of the light theme. Each of them is the only one of its value, so that the SVG's
text can be changed afterwards to `var(--name)`, and the browser chooses: light, dark (`prefers-color-scheme`) or print.
Hues are those of Okabe and Ito (2008, "Color Universal Design"), which people who see two cones' worth of colour tell
apart, made darker for white and lighter for black until each has a contrast of 3:1 or more to its background (WCAG 2.2,
1.4.11). No figure speaks by colour alone: arms also differ by marker, controls also by dashes, new layers by marker.
The ramp over depth is viridis, its dark end on white and its bright end on black.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKGROUND = {"light": "#ffffff", "dark": "#14181d"}

INK, MUTED, AXIS, GRID, CONTROL = "#1c2128", "#57606b", "#868f99", "#dfe3e8", "#6a737d"
ON_FILL = "#fffffe"
"""Text on a filled mark."""
SERIES = ("#0a62a8", "#c4450c", "#007a5a", "#a2388f", "#8a6a00", "#2b86c5", "#6b4fc8", "#5d6d1a")
RAMP = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#20a07d", "#5f9a2c")
NEW = SERIES[1]
"""New layers, in every figure about weights and plans."""

_DARK_SERIES = ("#62aef5", "#ff9257", "#35c79a", "#e98ad4", "#e0b73e", "#a8dcff", "#b3a0ff", "#b9cc5b")
_DARK_RAMP = ("#45709f", "#36809a", "#2a9a95", "#22b089", "#4cc472", "#80d653", "#bfe12f", "#fde725")


def _named(ink: tuple[str, ...], series: tuple[str, ...], ramp: tuple[str, ...]) -> dict[str, str]:
    plain = dict(zip(("ink", "muted", "axis", "grid", "control", "on-fill"), ink, strict=True))
    return {
        **plain,
        **{f"series-{i}": c for i, c in enumerate(series)},
        **{f"ramp-{i}": c for i, c in enumerate(ramp)},
    }


LIGHT = _named((INK, MUTED, AXIS, GRID, CONTROL, ON_FILL), SERIES, RAMP)
DARK = _named(("#e6e9ee", "#a9b2bd", "#7a8490", "#303740", "#9aa4af", "#14181d"), _DARK_SERIES, _DARK_RAMP)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))


@dataclass(frozen=True)
class Stroke:
    """How one series is drawn: colour, marker, and dashes in points (none: a solid line)."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()


def arm_stroke(index: int, control: bool) -> Stroke:
    """The stroke of the index-th method, or of the index-th control, of a comparison."""
    if control:
        return Stroke(CONTROL, MARKERS[index % len(MARKERS)], _DASHES[1 + index % 3])
    return Stroke(SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)], _DASHES[index // len(SERIES) % 4])


def depth_colour(index: int, layers: int) -> str:
    """The colour of a layer: from the ramp's first step at the embedding to its last at the head."""
    return RAMP[round(index * (len(RAMP) - 1) / max(layers - 1, 1))]


def variables(theme: dict[str, str]) -> str:
    """CSS custom properties of a theme."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())
