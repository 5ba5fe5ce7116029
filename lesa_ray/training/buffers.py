"""The buffers of a model: what its modules hold beside parameters (rotary frequencies, the router's correction bias).

Decides
- Each begins as transformers makes it in a new model. Its `_init_weights` runs over all modules while the buffers are
  in memory and the parameters still on the meta device, where initialising them costs nothing. Buffers that it leaves
  alone (Apertus' activation) are as their modules' constructors make them, for which the model is constructed once
  more, each parameter given back as soon as it is made.
- Every worker holds them whole, on the device that computes, with `cpu_offload` too: FSDP2 neither shards nor moves
  what a module brings along.
- Persistent ones belong to a checkpoint: they are read from a base's files, and go into the training checkpoints of a
  model without a base and into what is exported from it. Nothing here changes them in training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that belong to a checkpoint, by name."""
    return {
        _join(prefix, name): buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def initial_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All buffers of a new model, by name, on the CPU, the same in every process.

    model: on the meta device, neither compiled nor sharded; it is left so."""
    before = dict(_buffers(model))
    given = {name: torch.empty_like(buffer, device="cpu") for name, buffer in before.items()}
    versions = {name: buffer._version for name, buffer in given.items()}
    place_buffers(model, given, "cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        _initialise(model, model)
    made = dict(_buffers(model))
    place_buffers(model, before, "meta")
    if left := [name for name, buffer in made.items() if buffer is given[name] and buffer._version == versions[name]]:
        constructed = _as_constructed(model)
        made |= {name: constructed[name].to(before[name].dtype) for name in left}
    return made


def place_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor], device: str) -> None:
    """Let the model hold these as its buffers, on a device."""
    for prefix, module in model.named_modules():
        for name in module._buffers:
            if _join(prefix, name) in buffers:
                module._buffers[name] = buffers[_join(prefix, name)].to(device)


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return model.named_buffers(remove_duplicate=False)


def _initialise(module: nn.Module, owner: PreTrainedModel) -> None:
    """transformers' own initialisation, each part of a composite model by its own class, children first."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _initialise(child, owner)
    owner._init_weights(module)


def _as_constructed(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers as the constructors of the model's modules make them."""
    with torch.device("cpu"), _parameters_on_meta(), no_init_weights():
        return dict(_buffers(type(model)(copy.deepcopy(model.config))))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules keep only the shape of a parameter that they are given; its memory, never written to, goes at once."""
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
