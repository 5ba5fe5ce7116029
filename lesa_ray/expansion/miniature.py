"""A miniature of an architecture: its class and settings, but few layers, a small vocabulary and narrow feed-forward.

What holds for an architecture whatever its size can be tried on one in a second, and no weight is read."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from lesa_ray.checkpoint.anatomy import config_depth
from lesa_ray.checkpoint.depth import LAYER_INDICES, PER_LAYER

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


def miniature(full: Mapping[str, Any], *, layers: int = 2, also: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The content of a miniature's config.json.

    full: config.json as transformers completes it (`completed_config`). also: further settings, as upper bounds."""
    raw = copy.deepcopy(dict(full))
    depth = config_depth(raw)
    assert depth is not None
    for key, value in raw.items():
        if isinstance(value, list) and (key in PER_LAYER or len(value) == depth[1]):
            raw[key] = value[:layers]
        elif isinstance(value, list) and key in LAYER_INDICES:
            raw[key] = [index for index in value if index < layers]
        elif isinstance(value, dict) and value and all(str(name).isdigit() for name in value):
            raw[key] = {name: inner for name, inner in value.items() if int(name) < layers}
    raw[depth[0]] = layers
    for key, value in {**_SMALLER, **(also or {})}.items():
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
