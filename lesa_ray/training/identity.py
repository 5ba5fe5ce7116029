"""What the result of a run depends on, and whether a run at OUT is the one that is asked for.

All of it is written down beside its hash, so that a run begun by an earlier version goes on where this one has new
settings, and so that what differs can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from lesa_ray import __version__
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.training.tokens import TokenBlocks
from lesa_ray.training.train_settings import TrainConfig

_RESOLVED = {"checkpoint", "architecture", "data", "train", "steps", "tokens", "epochs", "precision"}
"""Settings that stand for something else, which counts in their place."""
CONTENTS = {
    "config": "another config.json",
    "weights": "other weights of the checkpoint",
    "data": "other token blocks",
    "trained": "other parameters that are trained",
}
"""What of `counted` is read, and not set."""
_NAMED = 3


def counted(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    architecture: Mapping[str, Any],
    blocks: TokenBlocks,
    trained: tuple[str, ...],
    steps: int,
    bf16: bool,
) -> dict[str, Any]:
    """Everything that a result depends on, as JSON values."""
    return {
        "settings": config.model_dump(mode="json", exclude=config.not_counted | _RESOLVED),
        "config": _hash(architecture),
        "weights": None if checkpoint is None else checkpoint.digests(),
        "data": blocks.digest,
        "trained": _hash(trained),
        "steps": steps,
        "bf16": bf16,
    }


def identity_of(content: Mapping[str, Any]) -> str:
    """The hash of what `counted` gives."""
    return _hash(content)


def differences(record: Mapping[str, Any], content: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """How the run of a record (`run.json`) differs from one of these contents, in words; nothing if it is the same.

    A setting that the record does not have had the value that it has by default."""
    before = record.get("counted")
    if not isinstance(before, dict):
        return ["it was begun by a version that did not say of what"]
    were, are = before.get("settings", {}), content["settings"]
    fields = type(config).model_fields
    found = []
    for name in {**are, **were}:
        if name in are:
            default = fields[name].get_default(call_default_factory=True)
            was = were.get(name, to_jsonable_python(default))
            if was != are[name]:
                found.append(f"{name}: {was} there, {are[name]} now")
        elif name not in fields:
            found.append(f"{name}: {were[name]} there, no setting now")
    found += [
        f"{name}: {before.get(name)} there, {content[name]} now"
        for name in ("steps", "bf16")
        if before.get(name) != content[name]
    ]
    return found + [words for name, words in CONTENTS.items() if before.get(name) != content[name]]


def in_words(record: Mapping[str, Any], different: list[str]) -> str:
    """Differences in a message, and that another version began the run, if one did."""
    more = len(different) - _NAMED
    parts = [*different[:_NAMED], *([f"and {more} more"] if more > 0 else [])]
    version = record.get("lesa_ray")
    if version != __version__:
        parts.append(f"begun by lesa-ray {version or 'of an earlier version'}, this is {__version__}")
    return ", ".join(parts)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
