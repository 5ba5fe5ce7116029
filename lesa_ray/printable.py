"""Text from a checkpoint or its messages, for a terminal: control characters would steer it (its title, its clipboard,
what stands on it already)."""

from __future__ import annotations

_CONTROLS = dict.fromkeys((code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"), "\ufffd")


def printable(text: str) -> str:
    """The text with U+FFFD for each control character but newline and tab."""
    return text.translate(_CONTROLS)
