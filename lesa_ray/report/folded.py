"""Tables that are wider than the terminal, as several: cut figures would be worse than none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from rich.cells import cell_len
from rich.table import Column, Table

_FOLDS_TO = 12
"""The least cells of a column whose text is folded."""


def folded(table: Table, width: int) -> Iterator[Table]:
    """The table, or parts of it that fit into `width` cells: each has the first column, and as many of the others, in
    their order, as have room beside it. A part of two columns may still be too wide."""
    between = table.padding[1] + table.padding[3] + 1  # and a line of the box
    needed = [_narrowest(column) + between for column in table.columns]
    parts: list[list[int]] = [[0]]
    for index in range(1, len(needed)):
        if len(parts[-1]) > 1 and sum(needed[i] for i in (*parts[-1], index)) > width:
            parts.append([0])
        parts[-1].append(index)
    for number, chosen in enumerate(parts):
        part = copy.copy(table)
        part.columns = [replace(table.columns[index], _index=place) for place, index in enumerate(chosen)]
        if number > 0:
            part.title = None
        if number < len(parts) - 1:
            part.caption = None
        yield part


def _narrowest(column: Column) -> int:
    """The cells of its text that have to be on one line."""
    texts = [str(cell) for cell in (column.header, *column.cells)]
    longest = max(cell_len(piece) for text in texts for piece in ([text] if column.no_wrap else text.split() or [""]))
    return min(longest, max(column.min_width or 0, _FOLDS_TO)) if column.overflow == "fold" else longest
