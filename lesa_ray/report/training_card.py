"""The model card (README.md) of a trained checkpoint: what it is, what it was trained on, what that changed.

The base's `expansion.json` may be somebody else's: what is taken from it is of the form it should have, so that it adds
nothing of its own to a card that is published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.expansion.registry import METHODS

_HUB = re.compile(r"hf://([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:[@/]\S*)?", re.ASCII)
_PAPER = re.compile(r"https://[\w./-]+", re.ASCII)
_NOT_OF_NAMES = re.compile(r"[^\w. +-]")
_LABELS = {
    "data": "data",
    "trained": "what was trained",
    "trained_parameters": "parameters trained",
    "parameters": "parameters in all",
    "steps": "optimizer steps",
    "tokens": "tokens",
    "batch": "sequences a step",
    "seq_len": "tokens a sequence",
    "learning_rate": "learning rate, peak",
    "schedule": "schedule",
    "precision": "precision",
    "inserted": "new layers inserted",
    "heldout_loss_before": "held-out loss before",
    "heldout_loss": "held-out loss after",
}
"""What a table of facts says, in this order; other facts follow under their own names."""


def training_card(
    base: Checkpoint | None, manifest: Manifest | None, config: Mapping[str, object], facts: Mapping[str, object]
) -> str:
    """Markdown with the metadata block of the Hugging Face hub.

    base: what was trained on from; None: from scratch. manifest: the base's `expansion.json`. config: the result's
    config.json. facts: see `_LABELS`; None where not known, and then left out.
    """
    family = config.get("model_type", "unknown")
    hub = _hub_id(base, manifest)
    lines = ["---"]
    if hub:
        lines += [f"base_model: {hub}", "base_model_relation: finetune"]
    lines += ["library_name: transformers"]
    if manifest is not None:
        lines += ["tags:", "- depth-up-scaling"]
        method = manifest["method"] if manifest["method"] in METHODS else None
        lines += [f"- {method}"] if method else []
    lines += ["---", ""]
    if base is None:
        lines += [f"# A {family} model", "", f"A {family} model trained from random weights.", ""]
    else:
        name = _short(base.base)
        lines += [f"# {name}, trained on", "", f"`{name}` ({family}), trained on.", ""]
    if manifest is not None:
        named = method or "a method of another version"
        if _PAPER.fullmatch(manifest["paper"]):
            named = f"[{named}]({manifest['paper']})"
        new = [layer for layer in manifest["new_layers"] if isinstance(layer, int)]
        lines += [
            f"Before that it was grown deeper with {named} from "
            f"`{_short(manifest['base'])}`, {len(manifest['layers']) - len(new)} → "
            f"{len(manifest['layers'])} layers. New layers: {', '.join(map(str, new))}; "
            "`expansion.json` says where each layer comes from.",
            "",
        ]
    order = [*_LABELS, *(key for key in facts if key not in _LABELS)]
    known = [key for key in order if facts.get(key) is not None]
    if known:
        lines += ["| training | |", "|---|---|"]
        lines += [f"| {_LABELS.get(key, key.replace('_', ' '))} | {_shown(facts[key])} |" for key in known]
        lines += [""]
    lines += ["Weights that were not trained are equal, bit for bit, to those it started from.", ""] if base else []
    return "\n".join(lines)


def _hub_id(base: Checkpoint | None, manifest: Manifest | None) -> str | None:
    """The repository this descends from, if it is one of the hub's."""
    for url in (base.storage.url if base else "", manifest["base"] if manifest else ""):
        if found := _HUB.fullmatch(url):
            return found[1]
    return None


def _short(name: str) -> str:
    """Where its folder lies is nobody's business."""
    return _NOT_OF_NAMES.sub("", name.rstrip("/").rsplit("/", 1)[-1].split("@")[0])


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
