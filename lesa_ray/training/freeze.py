"""Which parameters are trained.

`new` are the layers that `expansion.json` calls new; `all` is everything; `norms`, `embeddings` and `lm_head` are found
by what transformers says of the model (its embeddings, its head) and by shape and name (a norm is a vector of a module
whose name says norm or ln); anything else is a pattern of parameter names (`*` and `?`). Tied embeddings and head are
one parameter, trained if either is named.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from lesa_ray.checkpoint.manifest import Manifest
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.errors import UserError

_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_?\w*)\.(weight|bias)$", re.IGNORECASE)


def default_choice(manifest: Manifest | None, where: str) -> tuple[str, ...]:
    """What the expansion's method trains. Raises: UserError where there is no `expansion.json`."""
    if manifest is None:
        raise UserError(
            f"checkpoint {where}: has no expansion.json, so which layers are new is not known; give --train all or "
            "patterns"
        )
    return (manifest["train"],)


def trained_names(model: nn.Module, chosen: Sequence[str], manifest: Manifest | None, where: str) -> tuple[str, ...]:
    """The parameters to train, in the model's order.

    Raises: UserError if a name or pattern matches no parameter."""
    names = [name for name, _ in model.named_parameters()]
    aliases = _aliases(model)
    found: set[str] = set()
    for choice in chosen:
        matched = _matched(model, choice, list(aliases), manifest, where)
        if not matched:
            raise UserError(f"train {choice}: matches no parameter of {where}, such as {names[0]} or {names[-1]}")
        found |= {aliases[name] for name in matched}
    return tuple(name for name in names if name in found)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter → the name under which `named_parameters` lists it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _matched(model: nn.Module, choice: str, names: list[str], manifest: Manifest | None, where: str) -> list[str]:
    if choice == "all":
        return names
    if choice == "new":
        if manifest is None:
            raise UserError(
                f"train new: {where} has no expansion.json that says which layers are new; give --train all"
            )
        new = set(manifest["new_layers"])
        return [name for name in names if layer_of(name) in new]
    if choice == "norms":
        return [name for name in names if _NORM.search(name)]
    if choice in ("embeddings", "lm_head"):
        module = model.get_input_embeddings() if choice == "embeddings" else model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            return []
        own = {id(parameter) for parameter in module.parameters()}
        return [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own]
    return [name for name in names if fnmatch.fnmatchcase(name, choice)]


def freeze(model: nn.Module, trained: Sequence[str]) -> int | None:
    """Let only `trained` have gradients; returns the lowest layer that has one, None if something below the layers has
    (then backward runs through all of them). If only what lies above is trained: the number of layers."""
    chosen = set(trained)
    layers: list[int] = []
    below = False
    depth = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        layer = layer_of(name)
        if layer is not None:
            depth = max(depth, layer + 1)
        if name not in chosen:
            continue
        if layer is not None:
            layers.append(layer)
        else:
            below = below or depth == 0
    if below:
        return None
    return min(layers, default=depth)
