"""rich's console, on which no text from a checkpoint can steer the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import rich.console
from rich.segment import Segment

from lesa_ray.printable import printable


class Console(rich.console.Console):
    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """As rich's, with printable text. What rich itself steers by are segments of another kind, and styles."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
