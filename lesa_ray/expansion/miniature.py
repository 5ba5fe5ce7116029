"""A miniature of an architecture: its class and settings, but few layers, a small vocabulary and narrow feed-forward.

What holds for an architecture whatever its size can be tried on one in a second, and no weight is read."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lesa_ray.checkpoint.depth import followed, follows_layers
from lesa_ray.checkpoint.settings import CHOSEN_KEYS, EXPERT_KEYS, HEAD_KEYS, WIDTH_KEYS, config_depth, configured

_HEADS = 4
_SMALLER = {  # settings that shrink a model and leave its structure
    "vocab_size": 64,
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
}


def miniature(
    full: Mapping[str, Any], *, keep: Sequence[int] = (0, 1), also: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The content of a miniature's config.json.

    full: config.json as transformers completes it (`completed_config`). keep: the layers that the miniature has, as
    far as the model has them. also: further settings, as upper bounds (`narrow`). A layer has as many experts as a
    token's choice among them needs."""
    raw = copy.deepcopy(dict(full))
    depth = config_depth(raw)
    assert depth is not None
    keep = [layer for layer in keep if layer < depth[1]]
    for key, value in raw.items():
        if isinstance(value, list) and len(value) == depth[1]:
            raw[key] = [value[layer] for layer in keep]
        elif value and follows_layers(key, value):
            raw[key] = followed(key, value, keep, depth[1])
    if isinstance(raw[depth[0]], int):
        raw[depth[0]] = len(keep)
    experts = dict.fromkeys(EXPERT_KEYS, _fewest_experts(raw))
    for key, value in {**_SMALLER, **experts, **(also or {})}.items():
        if isinstance(raw.get(key), int):
            raw[key] = min(raw[key], value)
    if widths := raw.get("intermediate_sizes"):  # a layer-wise scaled model's: equal ones stay equal
        raw["intermediate_sizes"] = [max(8, width * _SMALLER["intermediate_size"] // max(widths)) for width in widths]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if raw.get(key) is not None:
            raw[key] = 0
    raw.pop("dtype", None)
    raw.pop("torch_dtype", None)
    return raw


def narrow(full: Mapping[str, Any]) -> dict[str, int]:
    """Bounds that make the miniature of a wide model a narrow one: four heads of the same size. An architecture whose
    other sizes follow from these may not take them."""
    heads, width = configured(full, HEAD_KEYS), configured(full, WIDTH_KEYS)
    if heads is None or width is None or heads <= _HEADS or width % heads:
        return {}
    groups = full.get("num_key_value_heads") or heads
    narrower = width // heads * _HEADS
    return {
        **dict.fromkeys(HEAD_KEYS, _HEADS),
        "num_key_value_heads": _HEADS if groups == heads else 2,
        **dict.fromkeys(WIDTH_KEYS, narrower),
    }


def _fewest_experts(raw: Mapping[str, Any]) -> int:
    """As many as tokens are sent to; where they are chosen by groups, two in each at least, as groups are ranked by the
    best two (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    chosen = max((raw[key] for key in CHOSEN_KEYS if isinstance(raw.get(key), int)), default=0)
    if not chosen:
        return sys.maxsize
    groups, among = (max(raw.get(key) or 1, 1) for key in ("n_group", "topk_group"))
    return groups * max(2, math.ceil(chosen / among))


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' remarks and progress bars on the miniature from the user."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def shake(model: Any) -> None:
    """Draw all parameters away from their initial values, so that nothing hides behind a zero or a one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.1 if parameter.ndim > 1 else parameter + noise * 0.1)
