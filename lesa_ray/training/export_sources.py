"""Which trained parameters a file's tensors come from, and the tensors themselves.

The model's parameters and the files' tensors are not always the same: some are renamed, tied weights have two names,
and the experts of a layer are one tensor in the model and many in the files (`lesa_ray.training.conversion`). Training
is undone into the files' own tensors. Of fused experts two parameters, made into the files' tensors, stay in memory
while their layer is written; everything else comes and goes one at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lesa_ray.checkpoint.header import ELEMENT_NAMES, FORMAT_NAMES
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.shards import OutTensor
from lesa_ray.config import DtypeName
from lesa_ray.errors import UserError
from lesa_ray.training.buffers import persistent_buffers
from lesa_ray.training.conversion import Conversion, convert, held_twice, plan_conversions, revert
from lesa_ray.training.model import build
from lesa_ray.training.trained_state import TrainedState

if TYPE_CHECKING:
    import torch

_FUSED_HELD = 2
"""A layer's gate-and-up and down projections, whose experts take turns in the files."""

Sources = dict[str, Conversion]
"""For each tensor of the files that is written anew, the conversion that ties it to trained parameters."""


def sources_of_base(base: Checkpoint, state: TrainedState) -> Sources:
    """What of a base is written anew. Raises: UserError if the training checkpoint is not one of this base."""
    where = f"checkpoint {base.base}"
    model = build(base.config, where)
    conversions = plan_conversions(model, base.tensors, where)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in state.shapes.items():
        if name not in shapes:
            raise UserError(
                f"training checkpoint {state.url}: trained {name}, which {where} does not have; give the checkpoint "
                "the training began from"
            )
        if shapes[name] != shape:
            raise UserError(
                f"training checkpoint {state.url}: its {name} is {list(shape)}, that of {where} is "
                f"{list(shapes[name])}; give the checkpoint the training began from"
            )
    twice = [
        Conversion((name,), conversion.targets, True)
        for name, conversion in held_twice(model, base.tensors, conversions).items()
    ]
    return {
        source: conversion
        for conversion in (*conversions, *twice)
        if any(target in state.shapes for target in conversion.targets)
        for source in conversion.sources
    }


def sources_of_scratch(
    config: Mapping[str, Any], state: TrainedState, dtype: DtypeName
) -> tuple[Sources, list[OutTensor], str]:
    """The tensors of a model trained from random weights, in the model's order, and the model's class.

    They have the names that transformers gives them in files. dtype: of the parameters; persistent buffers, which are
    small, keep their own. Raises: UserError if the training checkpoint does not hold the whole model."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    model = build(dict(config), "configuration")
    kinds = {name: FORMAT_NAMES[dtype] for name, _ in model.named_parameters()}
    for name, buffer in persistent_buffers(model).items():
        kinds[name] = next(
            kind for kind, torch_name in ELEMENT_NAMES.items() if buffer.dtype == getattr(torch, torch_name)
        )
    for name in kinds:
        if name not in state.shapes:
            raise UserError(
                f"training checkpoint {state.url}: lacks {name}, so it cannot be exported without a base; give the "
                "checkpoint the training began from"
            )
    if strange := state.shapes.keys() - kinds.keys():
        raise UserError(
            f"training checkpoint {state.url}: holds {min(strange)}, which the configuration has no place for"
        )
    converts = bool(get_model_conversion_mapping(model))
    sources: Sources = {}
    tensors = []
    for name, kind in kinds.items():
        whole = torch.empty(state.shapes[name], device="meta")
        made = revert_weight_conversion(model, {name: whole}) if converts else {name: whole}
        conversion = Conversion(tuple(made), (name,), plain=not converts)
        sources |= dict.fromkeys(made, conversion)
        tensors += [OutTensor(source, kind, tuple(tensor.shape), None) for source, tensor in made.items()]
    return sources, tensors, type(model).__name__


class Maker:
    """Gives the files' tensors, read from the training checkpoint."""

    def __init__(
        self, state: TrainedState, sources: Sources, base: Checkpoint | None, config: Mapping[str, Any]
    ) -> None:
        self._state, self._sources, self._base, self._config = state, sources, base, config
        self._model: Any = None
        self._held: OrderedDict[Conversion, dict[str, torch.Tensor]] = OrderedDict()

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name in the files, in the dtype it was trained in. Raises: UserError; MachineError."""
        conversion = self._sources[name]
        if conversion.plain:
            return self._state.read(conversion.targets[0])
        if conversion not in self._held:
            while len(self._held) >= _FUSED_HELD:
                self._held.popitem(last=False)
            self._held[conversion] = self._reverted(conversion)
        self._held.move_to_end(conversion)
        return self._held[conversion][name]

    def _reverted(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        if self._model is None:
            self._model = build(dict(self._config), "configuration")
        whole = {name: self._state.read(name) for name in conversion.targets if name in self._state.shapes}
        if len(whole) < len(conversion.targets):  # trained in part
            assert self._base is not None
            stored = {name: self._base.read(name) for name in conversion.sources}
            whole = {**convert(self._model, conversion, stored), **whole}
        return revert(self._model, conversion, whole)
