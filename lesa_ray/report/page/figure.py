"""A figure of the page: panels that draw themselves, rendered as inline SVG for the page and as one PNG.

Decides
- A panel is a small plot (some 3.5 inches wide) with a function that draws on matplotlib's axes. In the page each panel
  is an SVG of its own, so that a browser sets them side by side as its width allows, and text stays readable on a
  telephone; in the PNG they are a grid.
- Text stays text (`svg.fonttype: none`): it is searched, selected, and set in the page's own font stack. Places are
  worked out with DejaVu Sans, which is wider than the fonts of the stack, so that nothing is clipped.
- Legends are outside the axes, in HTML or below the grid: they cover no data.
- No pyplot: it keeps figures in a global, and chooses a backend by what the machine has.

Costs about 0.15 s a panel for the SVG and as much for the PNG.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lesa_ray.report.page.fonts import FAMILY, families
from lesa_ray.report.page.palette import AXIS, BACKGROUND, GRID, INK, LIGHT, MUTED, Stroke

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH, HEIGHT = 3.6, 2.7
_COLUMNS = 3
_PNG_DPI = 160
_LINE = 0.137
"""Inches from a line of a tick's label to the next."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": FAMILY,
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": AXIS,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a name may have dollar signs
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
}


@dataclass(frozen=True)
class Panel:
    """One plot. Sizes in inches."""

    title: str
    draw: Callable[[Axes], None]
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class Entry:
    """A line of a legend. line: whether the stroke is drawn beside the marker; filled: whether the marker is."""

    label: str
    stroke: Stroke
    line: bool = True
    mark: bool = True
    filled: bool = True


@dataclass(frozen=True)
class Table:
    """The numbers of a figure, or numbers that need none. Cells are text; columns but the first are right-aligned."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def long(self) -> bool:
        """Whether a cell is too long for one line."""
        return any(len(cell) > 48 for row in self.rows for cell in row)


@dataclass(frozen=True)
class Figure:
    """name: of the PNG and the anchor. see: what to see in it. how: the commands that make it again."""

    name: str
    title: str
    see: str
    how: str
    panels: tuple[Panel, ...]
    legend: tuple[Entry, ...] = ()
    table: Table | None = field(default=None)


def svgs(figure: Figure) -> list[str]:
    """The panels as SVG elements that may stand in one HTML document: colours by CSS variables, ids of their own."""
    return [_inline(_svg(panel), f"{figure.name}-{i}", _label(figure, panel)) for i, panel in enumerate(figure.panels)]


def png(figure: Figure) -> tuple[bytes, str]:
    """All panels with title and legend on white, as a PNG of 160 pixels an inch; letters that no font here has."""
    from matplotlib.text import Text

    with _styled():
        canvas = _canvas(figure)
    chosen, lacking = families("".join(text.get_text() for text in canvas.findobj(Text)))
    with _styled({"font.family": chosen}):
        if len(chosen) > 1:
            canvas = _canvas(figure)
        out = io.BytesIO()
        canvas.savefig(out, format="png", dpi=_PNG_DPI, facecolor=BACKGROUND["light"])
    return out.getvalue(), lacking


def _canvas(figure: Figure) -> Canvas:
    """The panels in a grid, the title above and the legend below."""
    from matplotlib.figure import Figure as Canvas

    columns = 2 if len(figure.panels) == 4 else min(_COLUMNS, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    width = max(panel.width for panel in figure.panels) * columns
    keys = math.ceil(len(figure.legend) / _legend_columns(figure.legend, width)) if figure.legend else 0
    height = max(panel.height for panel in figure.panels) * rows + 0.35 + 0.2 * keys
    canvas = Canvas(figsize=(width, height), layout="constrained")
    canvas.suptitle(_wrapped(figure.title, int(width * 10)), x=0.01, ha="left")
    grid = canvas.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, axes in zip(figure.panels, grid, strict=False):
        _draw(panel, axes)
    for axes in grid[len(figure.panels) :]:
        axes.set_visible(False)
    if figure.legend:
        canvas.legend(
            handles=[_handle(entry) for entry in figure.legend],
            loc="outside lower left",
            ncols=_legend_columns(figure.legend, width),
        )
    return canvas


@contextmanager
def _styled(more: Any = None) -> Iterator[None]:
    """matplotlib with the page's style, and silent about letters (`png` tells which are lacking) and their weight."""
    from matplotlib import rc_context

    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    with rc_context({**_STYLE, **(more or {})}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def plot_line(axes: Axes, x: Sequence[float], y: Sequence[float], stroke: Stroke, **more: Any) -> None:
    """A line in a stroke, without markers unless `more` says otherwise."""
    if stroke.dashes:
        more.setdefault("dashes", stroke.dashes)
    axes.plot(x, y, color=stroke.colour, **more)


def plot_marks(axes: Axes, x: Sequence[float], y: Sequence[float], stroke: Stroke, **more: Any) -> None:
    """Markers alone. `filled=False` leaves them open."""
    filled = more.pop("filled", True)
    more.setdefault("markersize", 5.5)
    more.setdefault("markeredgewidth", 1.2)
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=stroke.marker,
        color=stroke.colour,
        markerfacecolor=stroke.colour if filled else "none",
        **more,
    )


def rows_axis(axes: Axes, labels: Sequence[str], wrap: int = 18) -> None:
    """The y axis as named rows, the first one on top. wrap: characters of a line, half as many more for long names."""
    axes.set_yticks(range(len(labels)), _row_names(labels, wrap), multialignment="right")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def rows_height(labels: Sequence[str], wrap: int = 18) -> float:
    """Inches of a panel with these named rows: as far apart as the longest name has lines."""
    lines = max((name.count("\n") + 1 for name in _row_names(labels, wrap)), default=1)
    return 0.75 + max(0.34, _LINE * lines + 0.1) * len(labels)


def _row_names(labels: Sequence[str], wrap: int) -> list[str]:
    """The labels in lines no longer than it takes to have three of them, if that can be."""
    names: list[str] = []
    for width in range(wrap, wrap * 3 // 2 + 1):
        names = [_wrapped(label, width) for label in labels]
        if all(name.count("\n") < 3 for name in names):
            break
    return names


def layer_axis(axes: Axes, layers: int, label: str = "layer (0 is next to the embedding)") -> None:
    """The x axis as layer indices."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel(label)


def plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis (`x` or `y`) whose ticks are plain numbers: 0.01, 1, 1000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    narrow = low > 0 and high / low < 50
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if narrow else (1,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else short_number(value)))


def short_number(value: float) -> str:
    """A number for ticks and text, in at most six characters or so: 0, 250, 1.5k, 20M, 3G."""
    for power, unit in zip(range(24, 0, -3), "YZEPTGMk", strict=True):
        if abs(value) >= 0.9995 * 10**power:  # 999,900 is 1M, not 1e+03k
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def short_ticks(axes: Axes) -> None:
    """Ticks of the x axis as short numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _wrapped(text: str, width: int) -> str:
    """In lines of at most so many characters; one word, as names are, is parted after its dots."""
    import textwrap

    if " " in text:
        return "\n".join(textwrap.wrap(text, width)) or text
    return "\n".join(textwrap.wrap(text.replace(".", ". "), width)).replace(". ", ".") or text


def _label(figure: Figure, panel: Panel) -> str:
    return f"{figure.title}: {panel.title}" if panel.title else figure.title


def _draw(panel: Panel, axes: Axes) -> None:
    panel.draw(axes)
    if panel.title:
        axes.set_title(_wrapped(panel.title, int(panel.width * 10)))
    lines = axes.get_xlabel().splitlines()
    axes.set_xlabel("\n".join(_wrapped(line, int(panel.width * 10)) for line in lines))


def _svg(panel: Panel) -> str:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import TightLayoutEngine  # measures text once, the constrained one twice

    with _styled({"svg.hashsalt": "lesa-ray"}):
        canvas = Canvas(figsize=(panel.width, panel.height), layout=TightLayoutEngine(pad=0.4))
        _draw(panel, canvas.add_subplot())
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _inline(svg: str, name: str, label: str) -> str:
    """matplotlib's SVG document as an element: no prolog, no metadata, ids of its own, colours as CSS variables."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px) [^;\"]+", r"\1 var(--figure-font)", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--figure-font)", svg)
    for token, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{token})")
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{escape(label)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def _legend_columns(legend: Sequence[Entry], width: float) -> int:
    """How many entries stand side by side in so many inches."""
    longest = max(len(entry.label) for entry in legend)
    return max(1, min(len(legend), int(width / (0.5 + 0.075 * longest))))


def _handle(entry: Entry) -> Any:
    from matplotlib.lines import Line2D

    stroke = entry.stroke
    line = Line2D(
        [],
        [],
        color=stroke.colour,
        marker=stroke.marker if entry.mark else "none",
        label=entry.label,
        linestyle="-" if entry.line else "none",
        markerfacecolor=stroke.colour if entry.filled else "none",
    )
    if entry.line and stroke.dashes:
        line.set_dashes(stroke.dashes)
    return line


_SHAPES = {
    "o": '<circle cx="13" cy="6" r="3.4"/>',
    "s": '<rect x="9.8" y="2.8" width="6.4" height="6.4"/>',
    "^": '<path d="M13 1.8 17 9.2H9z"/>',
    "v": '<path d="M13 10.2 17 2.8H9z"/>',
    "<": '<path d="M8.8 6 16.2 2v8z"/>',
    ">": '<path d="M17.2 6 9.8 2v8z"/>',
    "D": '<path d="M13 1.4 17.4 6 13 10.6 8.6 6z"/>',
    "P": '<path d="M11.4 2h3.2v2.4H17v3.2h-2.4V10h-3.2V7.6H9V4.4h2.4z"/>',
    "X": '<path d="M9 3.6 10.6 2 13 4.4 15.4 2 17 3.6 14.6 6 17 8.4 15.4 10 13 7.6 10.6 10 9 8.4 11.4 6z"/>',
    "p": '<path d="M13 2 17 5 15.5 9.6H10.5L9 5z"/>',
}


def swatch(entry: Entry) -> str:
    """A legend's entry as a small SVG."""
    stroke = entry.stroke
    colour = stroke.colour
    for token, value in LIGHT.items():
        if value == colour:
            colour = f"var(--{token})"
    dashes = f' stroke-dasharray="{" ".join(f"{d:g}" for d in stroke.dashes)}"' if stroke.dashes else ""
    line = f'<path d="M1 6H25" fill="none" stroke-width="2"{dashes}/>' if entry.line else ""
    fill = colour if entry.filled else "none"
    mark = f'<g fill="{fill}" stroke-width="1.2">{_SHAPES[stroke.marker]}</g>' if entry.mark else ""
    return f'<svg class="swatch" viewBox="0 0 26 12" aria-hidden="true" stroke="{colour}">{line}{mark}</svg>'
