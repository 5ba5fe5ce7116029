"""How the tensors of decoders are named: `model.layers.17.self_attn.q_proj.weight` is stack, layer and weight type.

What lies in a tensor at index i of its first axis is named as in Python, `model.layers.17.mlp.experts.down_proj[3]`."""

from __future__ import annotations

import re

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)\.(?P<type>.+)$")
"""Groups: `stack` (`model.layers.`), `index`, `type`. No match is outside the layers."""
_ITEM = re.compile(r"^(?P<whole>.+)\[(?P<index>\d+)\]$")


def layer_of(name: str) -> int | None:
    """The layer that a tensor or parameter belongs to; None outside the layers."""
    match = LAYER.match(name)
    return int(match["index"]) if match else None


def item_name(whole: str, index: int) -> str:
    """The name of what lies at `index` of the first axis of tensor `whole`."""
    return f"{whole}[{index}]"


def item_of(name: str) -> tuple[str, int] | None:
    """`item_name` undone; None for the name of a whole tensor."""
    match = _ITEM.match(name)
    return (match["whole"], int(match["index"])) if match else None
