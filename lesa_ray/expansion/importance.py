"""Positions by how much each layer does: which gaps `most-important` and `least-important` are, from an analysis.json.

A layer's importance is its block influence, 1 − cosine of the residual stream before and after it (ShortGPT, arXiv
2403.03853), as `lesa-ray analyze BASE --data … --out …` measured it. Planning itself stays pure: it reads these figures
from a file, whose digest counts for what the expansion is.

Papers disagree, so both are offered. Least: ADEPT (arXiv 2510.10071) duplicates the layers least critical for what the
model already does, so that training disturbs it least. Most: Llama SLayer (arXiv 2410.02330) adds where the important
layers are, "a denser injection". Both measure importance by what a model loses without a layer; block influence is a
cheap stand-in that need not agree with that (arXiv 2605.14075).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from lesa_ray.checkpoint.anatomy import Anatomy
from lesa_ray.checkpoint.reader import SAMPLED, Checkpoint
from lesa_ray.checkpoint.storage import read_file
from lesa_ray.config import ExpandConfig
from lesa_ray.errors import UserError
from lesa_ray.expansion.plan import BY_IMPORTANCE


@dataclass(frozen=True)
class Importance:
    """Block influence of each layer of the base, and the SHA-256 of the file that it is from."""

    influence: tuple[float, ...]
    digest: str


def read_importance(config: ExpandConfig, checkpoint: Checkpoint, anatomy: Anatomy) -> Importance | None:
    """The figures that `config.importance` names; None where the position needs none.

    Raises: UserError if only one of the two settings is given, or the file is not an analysis of this base with data.
    """
    wanted = config.position in BY_IMPORTANCE
    if config.importance is None:
        if wanted:
            raise UserError(
                f"--position {config.position}: needs importance: FILE, the analysis.json of "
                f"`lesa-ray analyze {config.base} --data … --out …`"
            )
        return None
    if not wanted:
        raise UserError(f"importance {config.importance}: is used by the positions {' and '.join(BY_IMPORTANCE)} alone")
    where = f"importance {config.importance}"
    content = read_file(config.importance, where)
    try:
        analysis = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error})") from error
    if not isinstance(analysis, dict) or analysis.get("kind") != "analysis":
        raise UserError(f"{where}: is not an analysis.json; make one with `lesa-ray analyze BASE --data … --out …`")
    _check_base(analysis, checkpoint, anatomy, where)
    residual = analysis.get("residual")
    if not residual:
        raise UserError(f"{where}: was made without data, so it does not say what layers do; repeat it with --data")
    try:
        influence = tuple(1 - float(layer["cosine"]) for layer in residual["layers"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{where}: has no cosine for each layer; repeat the analysis") from error
    if len(influence) != anatomy.depth or not all(map(math.isfinite, influence)):
        raise UserError(f"{where}: has no finite cosine for each of the {anatomy.depth} layers; repeat the analysis")
    return Importance(influence, hashlib.sha256(content).hexdigest())


def _check_base(analysis: dict[str, Any], checkpoint: Checkpoint, anatomy: Anatomy, where: str) -> None:
    """Raises: UserError if the analysis is of another checkpoint, as far as that can be told: stores have digests of
    their own, so those of files that lie elsewhere cannot be compared."""
    identity = analysis.get("identity")
    weights = identity.get("weights", {}) if isinstance(identity, dict) else {}
    mine = checkpoint.digests()
    theirs = {name: found for name, found in weights.items() if isinstance(found, dict)}
    comparable = [
        name
        for name in mine.keys() & theirs.keys()
        if all(str(found[name].get("digest")).startswith(SAMPLED) for found in (mine, theirs))
    ]
    differs = any(mine[name] != theirs[name] for name in comparable)
    if analysis.get("layers") != anatomy.depth or mine.keys() != theirs.keys() or differs:
        raise UserError(f"{where}: is an analysis of {analysis.get('checkpoint')}, not of BASE {checkpoint.base}")
