"""Sizes in bytes as people write them: `500MB`, `5GB`, `2GiB`, `1000000`; and as they read them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in a size. Raises: ValueError with advice."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError("give bytes or a size such as 500MB, 5GB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(nbytes: float) -> str:
    """Bytes for people: 1.50 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"found {value!r}; {error}") from None


Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
"""A pydantic field of that many bytes."""
