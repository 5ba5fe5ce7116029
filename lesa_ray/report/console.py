"""rich's console for text that comes from elsewhere: names with [brackets] or :colons: stay as they are, and none can
steer the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rich.console
from rich.segment import Segment

from lesa_ray.printable import printable


class Console(rich.console.Console):
    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """As rich's, with printable text. What rich itself steers by are segments of another kind, and styles."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)
