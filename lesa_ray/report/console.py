"""rich's console for text that comes from elsewhere: names with [brackets] or :colons: stay as they are, none can steer
the terminal, and no figure of a table is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
from rich.segment import Segment
from rich.table import Table

from lesa_ray.printable import printable
from lesa_ray.report.folded import folded


class Console(rich.console.Console):
    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """As rich's, with printable text. What rich itself steers by are segments of another kind, and styles."""
        parts: Iterable[rich.console.RenderableType] = [renderable]
        if isinstance(renderable, Table) and renderable.show_header:
            parts = folded(renderable, (options or self.options).max_width)
        for part in parts:
            for text, style, control in super().render(part, options):
                yield Segment(text if control else printable(text), style, control)
