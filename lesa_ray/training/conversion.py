"""From the tensors of a checkpoint's files to a model's parameters, and back.

Most families store what the model holds, name by name. Some are renamed on the way (GPT-NeoX), some are fused
(mixture-of-experts: one tensor for all experts of a layer). transformers keeps these conversions as data
(`conversion_mapping`); here they are laid out as a plan, so that a worker can read its byte ranges where nothing is
converted, and one fused tensor at a time where something is; and so that training can be undone into the files' own
tensors when a checkpoint is exported.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lesa_ray.checkpoint.experts import expert_of
from lesa_ray.checkpoint.header import TensorEntry
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.checkpoint.settings import config_depth, further_layers
from lesa_ray.errors import UserError
from lesa_ray.training.buffers import persistent_buffers

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Conversion:
    """Tensors of the files that become tensors of the model. One to one and `plain`: the same content."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    plain: bool


def plan_conversions(model: PreTrainedModel, entries: Mapping[str, TensorEntry], where: str) -> list[Conversion]:
    """How the files' tensors make up the model's parameters and persistent buffers, each exactly once.

    model: on the meta device, not sharded yet. Raises: UserError if they do not: a tensor missing, left over, or of
    another shape."""
    wanted = model_tensors(model)
    aliases = _aliases(model)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = {**wanted, **{alias: wanted[name] for alias, name in aliases.items()}}
    prefix = model.base_model_prefix
    plain: dict[str, str] = {}
    fused: dict[str, tuple[str, list[str]]] = {}
    left_over = []
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            left_over.append(name)
        elif pattern is not None:
            fused.setdefault(target, (pattern, []))[1].append(name)
        elif target not in aliases or aliases[target] not in entries:
            plain.setdefault(aliases.get(target, target), name)
    found = [Conversion((source,), (target,), True) for target, source in plain.items()]
    for target, (_, sources) in fused.items():
        metas = {name: torch.empty(entries[name].shape, device="meta") for name in sources}
        made = _convert(model, target, metas, renamings, converters)
        _check_shapes(made, wanted, where)
        found.append(Conversion(tuple(sources), tuple(made), False))
    _check_complete(model, found, wanted, left_over, where)
    for conversion in found:
        if conversion.plain:
            source, target = conversion.sources[0], conversion.targets[0]
            stored = torch.empty(entries[source].shape, device="meta")
            _check_shapes({target: stored}, wanted, where)
    return found


def convert(model: PreTrainedModel, conversion: Conversion, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The model's tensors of a conversion, whole, made of the files' tensors (by name)."""
    if conversion.plain:
        return {conversion.targets[0]: tensors[conversion.sources[0]]}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    ordered = {name: tensors[name] for name in conversion.sources}
    return _convert(model, conversion.targets[0], ordered, renamings, converters)


def of_experts(conversion: Conversion, experts: int, start: int, end: int) -> Conversion | None:
    """What makes rows [start, end) of the one tensor of a conversion, which has a row for each expert, in their order;
    None if it is not made so.

    experts: rows of the whole tensor."""
    of_expert: dict[int | None, list[str]] = {}
    for name in conversion.sources:
        of_expert.setdefault(expert_of(name), []).append(name)
    if len(conversion.targets) > 1 or list(of_expert) != list(range(experts)):
        return None
    wanted = {name for expert in range(start, end) for name in of_expert[expert]}
    return replace(conversion, sources=tuple(name for name in conversion.sources if name in wanted))


def revert(model: PreTrainedModel, conversion: Conversion, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The files' tensors of a conversion, made of the model's (by name)."""
    if conversion.plain:
        return {conversion.sources[0]: tensors[conversion.targets[0]]}
    made = revert_weight_conversion(model, {name: tensors[name] for name in conversion.targets})
    missing = set(conversion.sources) - set(made)
    assert not missing, f"transformers does not undo its conversion of {sorted(missing)[:3]}"
    return {name: made[name] for name in conversion.sources}


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **persistent_buffers(model)}


def held_twice(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], conversions: Iterable[Conversion]
) -> dict[str, Conversion]:
    """The files' tensors that are further names of tied parameters, each with what the parameter is made of."""
    by_target = {target: conversion for conversion in conversions for target in conversion.targets}
    covered = {source for conversion in by_target.values() for source in conversion.sources}
    names = {**{name: name for name in model_tensors(model)}, **_aliases(model)}
    return {name: by_target[names[name]] for name in entries if name not in covered and name in names}


def _aliases(model: torch.nn.Module) -> dict[str, str]:
    """Further names of tied parameters → the name that `named_parameters` gives them."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _convert(
    model: PreTrainedModel,
    target: str,
    tensors: Mapping[str, torch.Tensor],
    renamings: list[Any],
    converters: list[Any],
) -> dict[str, torch.Tensor]:
    """Apply the one converter that makes `target` to the files' tensors, in their order."""
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    chosen = None
    for name, tensor in tensors.items():
        _, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, {})
        if chosen is None:
            chosen = copy.deepcopy(by_pattern[pattern])
        chosen.add_tensor(target, name, pattern, tensor)
    assert chosen is not None
    made = chosen.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _check_shapes(made: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str) -> None:
    for name, tensor in made.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise UserError(
                f"{where}: {name} is {list(tensor.shape)} in the files, config.json makes it {list(wanted[name].shape)}"
            )


def _predicts_further(name: str, config: PretrainedConfig) -> bool:
    """Whether a tensor is of a layer above the model's own; transformers knows these by index, which moves with the
    depth."""
    layer, raw = layer_of(name), config.to_dict()
    depth = config_depth(raw)
    return layer is not None and depth is not None and 0 <= layer - depth[1] < further_layers(raw)


def _check_complete(
    model: PreTrainedModel,
    found: Iterable[Conversion],
    wanted: Mapping[str, torch.Tensor],
    left_over: list[str],
    where: str,
) -> None:
    made = {target for conversion in found for target in conversion.targets}
    kind = type(model).__name__
    missing = [name for name in wanted if name not in made]
    if missing:
        raise UserError(
            f"{where}: lacks {len(missing)} of the {len(wanted)} tensors of {kind}, the first {missing[0]}; is it of "
            "another model?"
        )
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    # causal masks that older checkpoints of GPT-2 and GPT-NeoX hold
    ignored += [r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$"]
    for name in left_over:
        if not _predicts_further(name, model.config) and not any(re.search(pattern, name) for pattern in ignored):
            raise UserError(f"{where}: holds {name}, which {kind} has no place for")
