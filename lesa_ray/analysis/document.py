"""analysis.json: the figures of all pieces put together, and what they are of."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lesa_ray import __version__
from lesa_ray.analysis.subject import Subject
from lesa_ray.checkpoint.settings import WIDTH_KEYS, configured
from lesa_ray.expansion.widths import SIDES
from lesa_ray.places import shown

VERSION = 1
"""Of analysis.json."""
_PACKAGES = ("torch", "numpy", "scikit-learn")
_DIGITS = 6


def make_report(subject: Subject, results: dict[str, Any], residual: dict[str, Any] | None) -> dict[str, Any]:
    """analysis.json. results: of `work_on_type` and `work_on_block` by type and block.

    Numbers are rounded to six digits, beyond which they depend on threads and libraries."""
    checkpoint, anatomy = subject.checkpoint, subject.anatomy
    types: dict[str, dict[str, Any]] = {}
    fit: dict[str, dict[str, Any]] = {}
    for name in subject.types:
        figures, scores = results[name]
        found = [results[piece] for piece, block in subject.blocks.items() if name in block.matrices]
        types[name] = {
            **figures,
            "neighbour_cosine_matched": found[0]["neighbours"][name] if found else None,
            "neighbour_cosine_chance": found[0]["chance"][name] if found else None,
        }
        matched = {"matched": found[0]["candidates"][name]} if found and found[0]["candidates"][name] else {}
        fit[name] = {**(scores or {}), **matched}
    fit = {name: found for name, found in fit.items() if found}
    measured = {"types": types, "fit": fit or None, "residual": residual}
    return {
        "kind": "analysis",
        "version": VERSION,
        "checkpoint": shown(subject.config.base),
        "identity": {
            "weights": checkpoint.digests(),
            "config": hashlib.sha256(checkpoint.storage.read("config.json")).hexdigest(),
        },
        "family": anatomy.family,
        "layers": anatomy.layers,
        "hidden_size": configured(checkpoint.config, WIDTH_KEYS),
        "new_layers": subject.new_layers,
        "uneven": _uneven(subject),
        "created_with": _versions(),
        "settings": subject.config.model_dump(mode="json", exclude={"out"}),
        "fit_missing": subject.why_not_fitted,
        "matched_missing": subject.why_not_matched,
        **_rounded(measured),
    }


def _uneven(subject: Subject) -> str | None:
    """What to know of figures over layers that differ; None where they do not."""
    if subject.anatomy.own is not None:
        return _several_kinds(subject)
    if subject.widths is None:
        return None
    ranges = {}
    for side in SIDES:
        found = sorted({width[side] for width in subject.widths.base})
        ranges[side] = f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
    said = (
        f"layers differ in width (FFN {ranges['neurons']}, query heads {ranges['heads']}): norms, spectra and ranks "
        "are of each layer as it is; the common basis, pictures, cosines and the fit are of layers padded with zeros "
        "to the widest, as expand pads them"
    )
    if len(subject.old_widths) > 1:
        said += (
            "; matching pads the narrower of two neighbours, and candidates for a layer between are not scored, as "
            "their width would count for more than what they hold"
        )
    return said


def _several_kinds(subject: Subject) -> str:
    counts = {name: len(subject.layers_with(name)) for name in subject.types}
    fewest = min(counts, key=lambda name: counts[name])
    said = (
        f"layers are of several kinds: figures of a weight type are of the layers that have it ({fewest} is in "
        f"{counts[fewest]} of {subject.anatomy.layers}), likeness is of layers side by side"
    )
    if lacking := len(subject.types) - len(subject.fitted) if subject.fitted else 0:
        said += (
            f"; no predictor is fitted to {lacking} weight type{'s' if lacking > 1 else ''}, in too few layers in a row"
        )
    return said


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "lesa-ray": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
