"""Fonts of the images. DejaVu Sans comes with matplotlib and has no Chinese, Japanese or Korean, among others: other
fonts of the machine stand in for it. In the page a browser does the same by itself.
"""

from __future__ import annotations

from collections.abc import Set
from functools import cache

FAMILY = "DejaVu Sans"


def families(text: str) -> tuple[list[str], str]:
    """Font families to draw `text` with, the first that has a character decides; the characters that none has.

    Reading what fonts have takes some milliseconds each, and is done where `FAMILY` does not suffice."""
    from matplotlib import font_manager

    chosen, lacking = [FAMILY], {letter for letter in text if not letter.isspace()}
    lacking -= _letters(font_manager.findfont(FAMILY))
    known = font_manager.fontManager.ttflist if lacking else []
    regular = {one.name: one.fname for one in known if one.style == "normal" and str(one.weight) in ("400", "normal")}
    regular = {name: path for name, path in regular.items() if not name.startswith("Last Resort")}  # boxes for all
    while lacking and regular:
        name = max(sorted(regular), key=lambda name: len(lacking & _letters(regular[name])))
        found = lacking & _letters(regular.pop(name))
        if not found:
            break
        chosen.append(name)
        lacking -= found
    return chosen, "".join(sorted(lacking))


@cache
def _letters(path: str) -> Set[str]:
    """The characters of a font file; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
