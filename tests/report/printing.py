"""What a terminal would show."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from lesa_ray.expansion.layout import Expansion
from lesa_ray.report import terminal
from lesa_ray.report.console import Console


def printed(show: Callable[[Expansion], None], expansion: Expansion, width: int) -> str:
    """What one of `terminal`'s functions prints of an expansion, on a terminal so many characters wide."""
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal, "console", Console(file=file, width=width))
        show(expansion)
    return file.getvalue()
