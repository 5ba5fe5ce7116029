"""`expansion.json`, the manifest: what was done, from what, with which layers new.

It holds only what follows from the inputs and the seed (no times, no host, no paths but the base as it was named), so
that the same expansion gives the same bytes anywhere. Training reads from it which layers to train."""

from __future__ import annotations

import json
from typing import Any, Literal, NotRequired, TypedDict

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import UserError

MANIFEST_FILE = "expansion.json"
FORMAT = 1


class LayerRecord(TypedDict):
    """One layer of the result. `base_layers`: the layers of the base it descends from; `neighbours`: result indices."""

    index: int
    kind: Literal["old", "copy", "new"]
    base_layers: list[int]
    neighbours: list[int]


class Manifest(TypedDict):
    """The content of `expansion.json`."""

    format: int
    fingerprint: str
    base: str
    family: str
    method: str
    paper: str
    identity: dict[str, Any]
    layers: list[LayerRecord]
    zeroed: list[str]
    """Weight types that are zero in the new layers."""
    train: Literal["new", "all"]
    """What the method's paper trains afterwards: `new_layers`, or everything."""
    new_layers: list[int]
    parameters: dict[str, int]
    widths: NotRequired[dict[str, Any]]
    """Where layers differ in width: the rule, and for each new layer (by index) what was kept of its neurons and
    heads, numbered as in layers padded to the widest, and by which tensors' norms. Widths are in config.json."""
    fit: dict[str, Any]
    """What the units reported, by unit; for lesa the quality of each weight type's predictor."""


def read_manifest(storage: Storage) -> Manifest | None:
    """The manifest in a folder, or None if there is none (or none that can be read). It may be of another model, or
    another tool's: see `own_manifest`."""
    try:
        manifest: Manifest = json.loads(storage.read(MANIFEST_FILE))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def own_manifest(storage: Storage, layers: int, where: str, *, needed: bool) -> Manifest | None:
    """The manifest of a model of so many layers, or None.

    needed: whether it decides anything; one that is not the model's own counts as none where it does not.
    Raises: UserError where it does."""
    manifest = read_manifest(storage)
    if manifest is None or (why := _flaw(manifest, layers)) is None:
        return manifest
    if not needed:
        return None
    raise UserError(
        f"{where}: its {MANIFEST_FILE} is not this model's: {why}; remove it, or take a copy of the model without it"
    )


def _flaw(manifest: Manifest, layers: int) -> str | None:
    """Why it is not the manifest of a model of so many layers, if it is not."""
    texts = [manifest.get(key) for key in ("base", "method", "paper", "train")]
    new, told = manifest.get("new_layers"), manifest.get("layers")
    if not all(isinstance(text, str) for text in texts) or not isinstance(new, list) or not isinstance(told, list):
        return "it is not of lesa-ray's form"
    if len(told) != layers:
        return f"it tells of {len(told)} layers, the model has {layers}"
    if wrong := [layer for layer in new if type(layer) is not int or not 0 <= layer < layers]:
        return f"it calls layer {wrong[0]!r} new, the model has {layers} layers"
    return f"it calls all {layers} layers new" if len(set(new)) == layers else None


def manifest_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()
