"""A model of which each worker holds its share: built without weights, sharded, then filled from the files.

    configuration ▸ modules on the meta device ▸ freeze ▸ activation checkpointing ▸ compile ▸ FSDP2 ▸ memory ▸ weights

Buffers are not sharded and have a file of their own (`lesa_ray.training.buffers`).

Decides
- FSDP2 (`fully_shard`): each layer a group, the rest (embeddings, last norm, head) the root group. Each worker reads
  exactly the byte ranges of its shards (rows of dimension 0), eight of at most 16 MiB at once, so no process ever holds
  a whole model; only tensors that are converted pass through memory whole.
- Element types: what is trained is kept in float32, what is frozen in the files' own type, also within one group:
  FSDP2 wants one type of the trained alone (since torch 2.8), and casts all to the one they compute in before it sends
  them together. With precision bf16 that is bfloat16, and gradients are summed over workers in float32.
- Activations are checkpointed in layers that are trained or above one that is, never below: there is no backward pass
  there. transformers' own switch would make every layer's input require gradients.
- No dropout, whatever config.json says: one pass over much text does not over-fit (Llama, Qwen and Mistral have none),
  and losses would depend on the number of workers.
- From scratch: transformers' own initialisation, module by module on the CPU, from a seed made of the parameter's name,
  so that it does not depend on the number of workers; projections into the residual stream start 1/√(2·layers)
  smaller (GPT-2: Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lesa_ray.checkpoint.brought_code import for_transformers
from lesa_ray.checkpoint.header import ELEMENT_NAMES, FLOAT_BYTES, TORCH_NAMES
from lesa_ray.checkpoint.names import layer_of
from lesa_ray.checkpoint.ranges import PIECE, read_into, side_by_side
from lesa_ray.checkpoint.reader import Checkpoint
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.errors import UserError
from lesa_ray.layerwise.register import register
from lesa_ray.training.buffers import initial_buffers, place_buffers
from lesa_ray.training.conversion import Conversion, convert, model_tensors, of_experts


def build(raw: dict[str, Any], where: str) -> PreTrainedModel:
    """The model of a config.json (its content), on the meta device, in float32. Raises: UserError."""
    register()
    family = raw.get("model_type")
    if family not in CONFIG_MAPPING:
        raise UserError(f"{where}: transformers does not know the family {family!r} of its config.json")
    try:
        config = AutoConfig.for_model(**{**for_transformers(raw), "use_cache": False})
        for key, value in config.to_dict().items():
            if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # each family checks its settings in its own way
        raise UserError(
            f"{where}: config.json: transformers refuses it ({' '.join(str(error).split())[:200]})"
        ) from error
    return model.train()


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, from the bottom. Raises: UserError if there is not one stack of them."""
    found: dict[str, int] = {}
    for name, _ in model.named_parameters():
        layer = layer_of(name)
        if layer is not None:
            stack = name[: name.index(f".{layer}.")]
            found[stack] = max(found.get(stack, 0), layer + 1)
    if len(found) != 1:
        raise UserError(f"the model has {len(found)} stacks of layers ({', '.join(found)}); one is needed to train it")
    stack, depth = next(iter(found.items()))
    modules = model.get_submodule(stack)
    return [modules.get_submodule(str(index)) for index in range(depth)]


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    bf16: bool,
    stored: Mapping[str, str],
    lowest: int | None,
    activation_checkpointing: bool,
    compiled: bool,
    cpu_offload: bool,
) -> None:
    """Apply, in the order in which they must be: activation checkpointing, compile, FSDP2; then allocate memory.

    stored: element types (as safetensors calls them) of parameters in the files, by name; none from scratch.
    lowest: the lowest trained layer (None: below all). Buffers are those of a new model afterwards, the parameters'
    values still undefined."""
    layers = layers_of(model)
    buffers = initial_buffers(model)
    if activation_checkpointing:
        for layer in layers[lowest or 0 :]:
            _checkpoint_activations(layer)
    if compiled:
        _allow_graphs(2 * len(layers))
        for layer in layers:
            layer.compile()
    compute = torch.bfloat16 if bf16 else torch.float32
    policy: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, output_dtype=None),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    }
    _set_storage(model, stored)
    for layer in layers:
        fully_shard(layer, **policy)
    fully_shard(model, reshard_after_forward=False, **policy)
    model.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    model.tie_weights()
    place_buffers(model, buffers, mesh.device_type)  # with cpu_offload too: FSDP2 leaves them where they are


def _allow_graphs(count: int) -> None:
    """Let so many graphs be compiled of one function. Layers share their code; where each has shapes of its own, each
    needs a graph, and another to measure with. Past the limit (8) torch would run the rest uncompiled, slowly."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def _checkpoint_activations(layer: nn.Module) -> None:
    """As transformers' own switch does for one layer, without making its input require gradients."""
    if not hasattr(layer, "gradient_checkpointing"):
        raise UserError(
            f"activation checkpointing: {type(layer).__name__} cannot do it in this version of transformers"
        )
    layer.gradient_checkpointing = True  # type: ignore[assignment]
    layer._gradient_checkpointing_func = functools.partial(  # type: ignore[assignment]
        torch.utils.checkpoint.checkpoint, use_reentrant=False
    )


def stored_types(checkpoint: Checkpoint, conversions: Sequence[Conversion]) -> dict[str, str]:
    """The element type in the files of each of the model's tensors; of those made of several, if they have one."""
    found = {}
    for conversion in conversions:
        kinds = {checkpoint.tensors[source].dtype for source in conversion.sources}
        if len(kinds) == 1:
            found.update(dict.fromkeys(conversion.targets, kinds.pop()))
    return found


def _set_storage(model: nn.Module, stored: Mapping[str, str]) -> None:
    """The element type in which each (meta) parameter is kept: float32, as built, or a shorter one that it is stored in
    and that training does not change."""
    for name, parameter in model.named_parameters():
        kind = stored.get(name)
        if not parameter.requires_grad and kind is not None and FLOAT_BYTES.get(kind, 4) < 4:
            parameter.data = parameter.data.to(getattr(torch, TORCH_NAMES[kind]))


def load(model: PreTrainedModel, checkpoint: Checkpoint, conversions: Sequence[Conversion]) -> None:
    """Fill the shards of this process from the checkpoint's files.

    By its own byte ranges where a tensor is stored as the model holds it, else from one converted tensor at a time; of
    experts that the model fuses, from its own alone. Threads only read; this one fills, for gradient mode and current
    device are a thread's own.

    conversions: as `plan_conversions` made them before the model was sharded, or some of them."""
    tensors = model_tensors(model)
    with torch.no_grad():
        plain = (_own_pieces(checkpoint, c.sources[0], tensors[c.targets[0]]) for c in conversions if c.plain)
        for target, values in side_by_side(itertools.chain.from_iterable(plain)):
            target.copy_(values)
        fused = [c for c in conversions if not c.plain and any(_own_rows(tensors[name])[2] for name in c.targets)]
        parts = [_own_experts(model, checkpoint, conversion, tensors) for conversion in fused]
        sources = [name for part in parts for name in part.sources]
        reads = ((checkpoint.tensors[name].nbytes, functools.partial(checkpoint.read, name)) for name in sources)
        with closing(side_by_side(reads)) as coming:
            for part, conversion in zip(parts, fused, strict=True):
                read = {name: next(coming) for name in part.sources}
                for name, tensor in convert(model, part, read).items():
                    local, start, rows = _own_rows(tensors[name])
                    if rows:
                        local.copy_(tensor if part is not conversion else tensor[start : start + rows])


def _own_experts(
    model: PreTrainedModel, checkpoint: Checkpoint, conversion: Conversion, tensors: Mapping[str, torch.Tensor]
) -> Conversion:
    """What of a conversion makes this process's rows alone; all of it where nothing less does."""
    name = conversion.targets[0]
    _, start, rows = _own_rows(tensors[name])
    part = of_experts(conversion, tensors[name].shape[0], start, start + rows)
    if part is None:
        return conversion
    metas = {source: torch.empty(checkpoint.tensors[source].shape, device="meta") for source in part.sources}
    alone = convert(model, part, metas)[name].shape == (rows, *tensors[name].shape[1:])
    return part if alone else conversion


def _own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """This process's part of a tensor: the memory, its first row and how many rows (of dimension 0) it has."""
    if not isinstance(tensor, DTensor):
        return tensor, 0, max(tensor.shape[0] if tensor.ndim else 1, 0)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] if offset else 0, shape[0] if shape and 0 not in shape else 0


_Filling = tuple[torch.Tensor, torch.Tensor]
"""A part of a tensor's memory, and the values for it, in the files' element type."""


def _own_pieces(
    checkpoint: Checkpoint, name: str, tensor: torch.Tensor
) -> Iterator[tuple[int, Callable[[], _Filling]]]:
    """Calls that read this process's rows of a stored tensor, for `side_by_side`: pieces, however long a row is."""
    local, start, rows = _own_rows(tensor)
    if not rows:
        return
    entry = checkpoint.tensors[name]
    dtype = getattr(torch, ELEMENT_NAMES[entry.dtype])
    begin = entry.offset + start * (entry.nbytes // entry.shape[0] if entry.shape else 0)

    def read(target: torch.Tensor, first: int) -> _Filling:
        values = torch.empty(target.shape, dtype=dtype)
        read_into(checkpoint.storage, entry.file, begin + first * dtype.itemsize, _bytes(values))
        return target, values

    if not local.is_contiguous():  # a buffer may be, and is short
        yield local.numel() * dtype.itemsize, functools.partial(read, local, 0)
        return
    flat, step = local.view(-1), PIECE // dtype.itemsize
    for first in range(0, len(flat), step):
        part = flat[first : first + step]
        yield len(part) * dtype.itemsize, functools.partial(read, part, first)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def initialise(model: PreTrainedModel, raw: dict[str, Any], seed: int) -> None:
    """Fill the shards of this process with initial weights, the same for any number of workers.

    Buffers have their values since `shard`."""
    twin = build(raw, "architecture")
    targets = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    depth = len(layers_of(twin))
    types = {name.split(".", 1)[1] for name in _inner_names(twin)}
    writers = set(residual_writers(sorted(types)))
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    for prefix, module in twin.named_modules():
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        full = [f"{prefix}.{name}" if prefix else name for name in own]
        if not own or all(id(targets[name]) in done for name in full):
            continue
        for name in own:
            parameter = module._parameters[name]
            assert parameter is not None
            module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape))
        with _seeded(seed, tied[id(targets[full[0]])]), torch.no_grad():
            twin._init_weights(module)
        for name, whole in zip(own, full, strict=True):
            value = module._parameters[name]
            assert value is not None
            inner = _inner_name(whole)
            if inner in writers and value.ndim > 1:
                value.data.mul_((2 * depth) ** -0.5)
            local, start, rows = _own_rows(targets[whole])
            if rows:
                with torch.no_grad():
                    local.copy_(value.data[start : start + rows])
            done.add(id(targets[whole]))
            module._parameters[name] = nn.Parameter(value.to("meta"))


def _inner_names(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_parameters():
        if _inner_name(name):
            yield f"x.{_inner_name(name)}"


def _inner_name(name: str) -> str:
    """The weight type within a layer, as lesa_ray.checkpoint.anatomy calls it; empty outside the layers."""
    layer = layer_of(name)
    return "" if layer is None else name.split(f".{layer}.", 1)[1]


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


def trained_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in order."""
    chosen = set(names)
    return {name: parameter for name, parameter in model.named_parameters() if name in chosen}
