"""Places that others name, and what others may see of a place.

A URL may hold a password, or in its query what signs it. It is read as it was given; records, messages and
fingerprints, which are published, have it without.
"""

from __future__ import annotations

import re

_STORES = frozenset({"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
# what stands before an @ is a container of Azure's, or a repository of the hub or of GitHub
_USER = re.compile(r"\b(?!(?:az|abfss?|adl|wasbs?|hf|github)://)([a-z][a-z0-9+.-]*://)([^/?\s]*)@", re.IGNORECASE)
_QUERY = re.compile(
    r"""\b(https?://[^\s?'"<>]*)\?(?:[^\s'"<>]*?(?=[]:;,.)]*(?:[\s'"<>]|$)))""", re.IGNORECASE
)  # but for the words around it
_WHOLE = re.compile(r"([a-z0-9+.-]+::)*https?://\S*", re.IGNORECASE)
_SIGNS = re.compile(
    r"x-(amz|goog|oss|cos)-.*|signature|expires|policy|key-pair-id|(aws|oss)accesskeyid|googleaccessid|security-token"
    r"|token|access_token",
    re.IGNORECASE,
)
_AZURE_SIGNS = re.compile(r"sig|s[eprstv]|spr|sip|srt|sk(oid|tid|[tesv])|sdd|saoid|suoid|scid|ses", re.IGNORECASE)
"""Beside `sig` alone: they are short names of anything elsewhere."""


def is_of_a_store(place: str) -> bool:
    """Whether a place that somebody else's file names is to be opened: a path, or a URL of a store. Other addresses
    make requests to any host, and fsspec's chains of them (`::`) may run code."""
    scheme, sign, _ = place.partition("://")
    return not sign or (scheme in _STORES and "::" not in place)


def shown(text: str) -> str:
    """A place, or a text that names some, with no password in a URL, and in one of the web no user (which may be a
    token) and no query."""
    if "://" not in text:
        return text
    text = _USER.sub(_without_password, text)
    return text.partition("?")[0] if _WHOLE.fullmatch(text) else _QUERY.sub(r"\1", text)


_WEB = re.compile(r"(?:^|::)https?://")


def named(place: str) -> str:
    """A place without the query of a web address: what ends in the name's ending. Elsewhere `?` may be in a name."""
    return place.partition("?")[0] if _WEB.search(place) else place


def unsigned(place: str) -> str:
    """A place as it is told from others: as it is shown, with what in the query of a URL signs nothing."""
    seen = shown(place)
    _, sign, query = place.partition("?")
    if not sign or not _WHOLE.fullmatch(place):
        return seen
    parts = {part: part.partition("=")[0] for part in query.split("&")}
    azure = "sig" in parts.values()
    kept = [
        part for part, name in parts.items() if not (_SIGNS.fullmatch(name) or (azure and _AZURE_SIGNS.fullmatch(name)))
    ]
    return f"{seen}?{'&'.join(kept)}" if kept else seen


def _without_password(url: re.Match[str]) -> str:
    scheme, user = url[1], url[2].partition(":")[0]
    return scheme if scheme.lower() in ("http://", "https://") or not user else f"{scheme}{user}@"
