"""How the tensors of decoders are named: `model.layers.17.self_attn.q_proj.weight` is stack, layer and weight type."""

from __future__ import annotations

import re

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)\.(?P<type>.+)$")
"""Groups: `stack` (`model.layers.`), `index`, `type`. No match is outside the layers."""


def layer_of(name: str) -> int | None:
    """The layer that a tensor or parameter belongs to; None outside the layers."""
    match = LAYER.match(name)
    return int(match["index"]) if match else None
