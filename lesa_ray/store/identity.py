"""What a stage is: its kind, its inputs and the settings that count. Their hash says where its output lies.

    identity ──▶ canonical JSON ──▶ SHA-256 ──▶ STORE/KIND/LABEL-HASH12

So the place of a result is known before it is made, equal work finds its own result, and other work never touches it.
An input that another stage makes counts by that stage's hash, so all places of a graph are known at once. The version
of lesa-ray counts; versions of other packages do not, they are noted in the result's record. The idea is marin's
(marin-community/marin, `StepSpec`).

A label is for people (and says which results are versions of one another); names of stages and labels hold only
`A-Z a-z 0-9 . _ -` and begin with a letter or digit, so that no place lies outside the store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lesa_ray import __version__
from lesa_ray.errors import UserError

KINDS = ("tokenize", "expand", "pretrain", "finetune", "evaluate")
"""The kinds of stages, in the order of the data; each is a folder of the store."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PLACE = re.compile(rf"({'|'.join(KINDS)})/({_LABEL.pattern})-([0-9a-f]{{12}})")
_MISSING = object()


@dataclass(frozen=True)
class Identity:
    """What a stage's output depends on; JSON values throughout."""

    kind: str
    inputs: Mapping[str, Any]
    """By what the stage calls them: what identifies the content."""
    settings: Mapping[str, Any]
    """Those that count, defaults included."""
    code: str

    @property
    def content(self) -> dict[str, Any]:
        return {"kind": self.kind, "inputs": self.inputs, "settings": self.settings, "code": self.code}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(canonical(self.content)).hexdigest()

    def place(self, label: str) -> str:
        """Where the output lies, relative to the store. Raises: UserError if the label cannot be part of a name."""
        return f"{self.kind}/{checked_label(label, 'label')}-{self.digest[:12]}"

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Identity:
        """What `content` gave. Raises: KeyError."""
        return cls(content["kind"], content["inputs"], content["settings"], content["code"])


def canonical(value: object) -> bytes:
    """JSON in which equal values have equal bytes. Raises: ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def code_version() -> str:
    """The version of lesa-ray, which is part of what a stage is: that of the code that runs, whatever is installed."""
    return __version__


def checked_label(text: str, what: str) -> str:
    """`text` itself. Raises: UserError if it could name a place outside the store."""
    if not _LABEL.fullmatch(text) or ".." in text:
        raise UserError(
            f"{what} {text!r}: must begin with a letter or digit, go on with letters, digits and . _ -, without '..', "
            "and have 100 characters at most"
        )
    return text


def parse_place(place: str) -> tuple[str, str, str] | None:
    """Kind, label and the first 12 digits of the hash; None if `place` is not of that form."""
    found = _PLACE.fullmatch(place)
    return None if found is None or ".." in place else (found[1], found[2], found[3])


def difference(before: Identity, now: Identity) -> str:
    """Why `now` is not `before`, in words; what weighs more comes first."""
    if before.code != now.code:
        return f"code version changed: {before.code} → {now.code}"
    settings = [f"{now.kind}.{line}" for line in _changes(before.settings, now.settings)]
    if settings:
        more = f" and {len(settings) - 2} more" if len(settings) > 2 else ""
        return f"settings changed: {', '.join(settings[:2])}{more}"
    names = sorted({line.split(" ", 1)[0].split(".", 1)[0] for line in _changes(before.inputs, now.inputs)})
    return f"input changed: {', '.join(names)}"


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """`name (old → new)` of each leaf that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted(before.keys() | now.keys()):
            inner = f"{path}.{name}" if path else name
            yield from _changes(before.get(name, _MISSING), now.get(name, _MISSING), inner)
    elif before is _MISSING or now is _MISSING or canonical(before) != canonical(now):
        yield f"{path} ({_shown(before)} → {_shown(now)})"


def _shown(value: object) -> str:
    text = "none" if value is _MISSING or value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
