"""Places that others name, and what others may see of a place."""

from __future__ import annotations

_STORES = frozenset({"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})


def is_of_a_store(place: str) -> bool:
    """Whether a place that somebody else's file names is to be opened: a path, or a URL of a store. Other addresses
    make requests to any host, and fsspec's chains of them (`::`) may run code."""
    scheme, sign, _ = place.partition("://")
    return not sign or (scheme in _STORES and "::" not in place)
