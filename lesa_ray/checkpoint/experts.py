"""Experts of a mixture, told by the names and shapes of a layer's tensors.

Each has tensors of its own (`mlp.experts.3.down_proj.weight`), or all lie in one (gpt-oss, Granite MoE, Llama 4); then
each one's matrix in it is a weight type too, `mlp.experts.down_proj[3]`. A router, which chooses among them, has a row
or an entry for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.names import item_name, item_of
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.checkpoint.settings import EXPERT_KEYS, WIDTH_KEYS, configured

if TYPE_CHECKING:
    from lesa_ray.checkpoint.header import TensorEntry

_EXPERT = re.compile(r"(?P<before>(?:^|\.)experts\.|\[)(?P<number>\d+)(?P<after>\.|\]$)")
_EXPERTS = re.compile(r"(?:^|(?<=\.))experts\.")


def expert_of(weight_type: str) -> int | None:
    """Which of the experts a weight type is of; None of what is no expert's."""
    match = _EXPERT.search(weight_type)
    return int(match["number"]) if match else None


def kind_of(weight_type: str) -> str:
    """The name that experts of a kind share, with `*` for the number; of all else the name itself."""
    return _EXPERT.sub(r"\g<before>*\g<after>", weight_type)


def taken_apart(layer: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """A layer's tensors by weight type, those that hold all experts' matrices or biases as one for each expert."""
    experts = configured(config, EXPERT_KEYS)
    apart: dict[str, TensorEntry] = {}
    for name, entry in layer.items():
        if _holds_experts(name, entry, experts):
            apart |= {item_name(name, index): entry.item(index) for index in range(entry.shape[0])}
        else:
            apart[name] = entry
    return apart


def _holds_experts(name: str, entry: TensorEntry, experts: int | None) -> bool:
    """Whether a tensor holds all experts' matrices, one after the other (Granite MoE's names do not say `experts`; a
    convolution has no matrix at an index), or their biases."""
    if not entry.is_float or not entry.elements:
        return False
    named = _EXPERTS.search(name) is not None
    if len(entry.shape) == 3:
        return named or (entry.shape[0] == experts and min(entry.shape[1:]) > 1)
    return len(entry.shape) == 2 and named and name.endswith("bias")


def inputs_come_first(layer: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> bool:
    """Whether experts that lie in one tensor are stored (in_features, out_features), as gpt-oss' and Llama 4's are: the
    side on the residual stream is as wide as the model. Where one of them is square, others tell.

    layer: its tensors by weight type, as `taken_apart` gives them."""
    width = configured(config, WIDTH_KEYS)
    for name, entry in layer.items():
        if item_of(name) is not None and len(entry.shape) == 2 and entry.shape[0] != entry.shape[1]:
            first_is_residual = bool(residual_writers([name]))
            if width in entry.shape:
                return (entry.shape[0] == width) != first_is_residual
    return False


def count_experts(layer: Iterable[str]) -> dict[str, int]:
    """How many experts each module of a layer (its name with the dot behind it) holds. layer: its weight types."""
    numbers: dict[str, set[str]] = {}
    for name in layer:
        if match := _EXPERT.search(name):
            own = _EXPERTS.search(name)  # none where they lie in tensors of the module itself (Granite MoE)
            module = name[: own.start()] if own else re.sub(r"[^.]+(\.weight)?\[\d+\]$", "", name)
            numbers.setdefault(module, set()).add(match["number"])
    return {module: len(found) for module, found in numbers.items()}


def is_router(name: str, shape: tuple[int, ...], experts: Mapping[str, int]) -> bool:
    """A matrix or vector in the module that holds `experts` (`count_experts`), with a row or an entry for each: it
    chooses among them, and their order is its own. What all tokens share has no such axis, unless by chance."""
    if _EXPERT.search(name) or "shared" in name:
        return False
    for module, count in experts.items():
        beside = name.startswith(module) and not name.startswith(f"{module}experts.")
        if not module:  # they lie in the layer itself, as do its attention and all else
            beside = "." not in name.removesuffix(".weight") or name.startswith("router.")
        if beside and count in shape:
            return True
    return False
