"""The anatomy of a decoder, read off its tensors' names: which layer, which weight type.

No table of families: a name such as `model.layers.17.self_attn.q_proj.weight` falls into a stack (`model.layers.`), a
layer index (17) and a weight type (`self_attn.q_proj.weight`), and any family whose names do so works. What a type
is (matrix or vector, an expert's, a router, stored transposed) follows from shapes and names. Where all experts of a
layer lie in one tensor (gpt-oss, Granite MoE, Llama 4), each one's matrix in it is a weight type of its own, as where
each has a tensor: `mlp.experts.down_proj[3]`.

Layers may be of several kinds: the first few dense below layers of experts (DeepSeek-V3, GLM-4.5), attention among
recurrent layers (Qwen3-Next, Jamba). How much of that a caller can take, it says; what cannot be expanded soundly is
refused in one line: more differences than that, several stacks (encoder-decoders, vision towers), depth that disagrees
with the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lesa_ray.checkpoint.experts import count_experts, expert_of, inputs_come_first, is_router, kind_of, taken_apart
from lesa_ray.checkpoint.names import LAYER, item_of
from lesa_ray.checkpoint.settings import DEPTH_KEYS, config_depth, further_layers
from lesa_ray.errors import UserError

if TYPE_CHECKING:
    from lesa_ray.checkpoint.header import TensorEntry
    from lesa_ray.checkpoint.reader import Checkpoint

_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")

Kind = Literal["matrix", "vector", "router", "other"]
Differ = Literal["nothing", "below", "shapes", "tensors"]
"""What may differ among layers. below: the first ones, fewer than half, may have other tensors than those above, which
are alike; shapes: tensors of a name may be of several shapes; tensors: anything."""

_NOT_SUPPORTED = "; models whose layers differ are not supported"
_FURTHER_STACK = re.compile(r"(^|\.)mtp\.")
"""Where layers that predict further tokens lie in some families (Qwen3-Next, MiMo); in others above the stack."""


@dataclass(frozen=True, slots=True)
class WeightType:
    """One tensor that every layer has, or one expert's part of it. `shape`, `dtype` are those in the files."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    transposed: bool = False
    """Whether the files hold (in_features, out_features), as transformers' Conv1D does (GPT-2)."""

    @property
    def d1(self) -> int:
        """Output features: rows of W in y = W x."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def d2(self) -> int:
        """Input features: columns of W."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def expert(self) -> int | None:
        """Which of the experts it is of; None of what is no expert's."""
        return expert_of(self.name)

    @property
    def is_expert(self) -> bool:
        return self.expert is not None

    @property
    def tensor(self) -> str:
        """The tensor in the files, by its name within the layer, that it is or lies in."""
        item = item_of(self.name)
        return item[0] if item is not None else self.name

    @property
    def of_its_kind(self) -> str:
        """The name that experts of a kind share, with `*` for the number; of all else the name itself."""
        return kind_of(self.name)


@dataclass(frozen=True)
class Anatomy:
    """A stack of `layers` layers to work on, counted from 0, and the tensors outside it. Picklable, no weights."""

    family: str
    stack: str
    layers: int
    types: dict[str, WeightType]
    """Of all layers, in shapes of the first that has it."""
    outside: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """config.json, for what names and shapes do not say."""
    below: int = 0
    """Layers of the model beneath the stack, whose tensors are others; they count as outside."""
    own: tuple[frozenset[str], ...] | None = None
    """Where layers differ in their tensors, which each has."""

    @property
    def depth(self) -> int:
        """The model's layers."""
        return self.below + self.layers

    def name(self, layer: int, weight_type: str) -> str:
        """The tensor's name in the files."""
        return f"{self.stack}{self.below + layer}.{weight_type}"

    def has(self, layer: int, weight_type: str) -> bool:
        """Whether a layer has a weight type, by name."""
        return self.own is None or weight_type in self.own[layer]

    def types_of(self, layer: int) -> tuple[WeightType, ...]:
        """The weight types that a layer has."""
        return tuple(t for t in self.types.values() if self.has(layer, t.name))

    def stored(self, layer: int) -> dict[str, tuple[WeightType, ...]]:
        """A layer's tensors in the files, by their names within the layer, with the weight types that lie in each."""
        found: dict[str, list[WeightType]] = {}
        for weight_type in self.types_of(layer):
            found.setdefault(weight_type.tensor, []).append(weight_type)
        return {name: tuple(types) for name, types in found.items()}

    def layers_with(self, *weight_types: str) -> list[int]:
        """The layers that have all of some weight types, by name."""
        wanted = {*weight_types}
        return [layer for layer in range(self.layers) if self.own is None or wanted <= self.own[layer]]

    @property
    def matrices(self) -> tuple[WeightType, ...]:
        """The 2-D weight types, routers' left out: what a method makes anew."""
        return tuple(t for t in self.types.values() if t.kind == "matrix")

    @property
    def kinds(self) -> dict[str, tuple[WeightType, ...]]:
        """The matrices, experts of a kind together under the name that they share."""
        found: dict[str, tuple[WeightType, ...]] = {}
        for weight_type in self.matrices:
            kind = weight_type.of_its_kind
            found[kind] = (*found.get(kind, ()), weight_type)
        return found

    @property
    def vectors(self) -> tuple[WeightType, ...]:
        return tuple(t for t in self.types.values() if t.kind == "vector")


def read_anatomy(checkpoint: Checkpoint, *, differ: Differ = "nothing", hint: str = _NOT_SUPPORTED) -> Anatomy:
    """Find the stack of layers of a checkpoint.

    differ: what may differ among its layers. hint: what to do where more does, the end of the message.
    Raises: UserError, one line, if there is no stack, more than one, or layers differ in more.
    """
    base = checkpoint.base
    stack, found, outside = _find_stack(checkpoint)
    depth = config_depth(checkpoint.config)
    further = further_layers(checkpoint.config)
    more = further if depth is not None and len(found) == depth[1] + further else 0
    stacked = [found[index] for index in range(len(found) - more)]
    below = _first_alike(stacked) if differ == "below" else 0
    if differ != "tensors":
        _check_alike(base, stack, stacked, below, shapes=differ != "shapes", hint=hint)
    if depth is None:
        raise UserError(f"BASE {base}: config.json has none of {', '.join(DEPTH_KEYS)}")
    if depth[1] != len(stacked):
        raise UserError(f"BASE {base}: config.json says {depth[0]} = {depth[1]}, the files hold {len(found)} layers")
    apart = [*range(below), *range(len(stacked), len(found))]
    outside += [entry.name for index in apart for entry in found[index].values()]
    family = str(checkpoint.config.get("model_type", "unknown"))
    alike = [taken_apart(layer, checkpoint.config) for layer in stacked[below:]]
    own = tuple(map(frozenset, alike))
    return Anatomy(
        family,
        stack,
        len(alike),
        _weight_types(family, checkpoint.config, alike),
        tuple(outside),
        checkpoint.config,
        below,
        own if len(set(own)) > 1 else None,
    )


def _find_stack(checkpoint: Checkpoint) -> tuple[str, dict[int, dict[str, TensorEntry]], list[str]]:
    """The one stack's name, its layers' tensors by index and weight type, none missing, and the names of the others.

    Raises: UserError if there is none, more than one, or a layer is missing."""
    base = checkpoint.base
    stacks: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    outside = []
    for entry in checkpoint.tensors.values():
        match = LAYER.match(entry.name)
        if match is None or _FURTHER_STACK.search(match["stack"]):
            outside.append(entry.name)
            continue
        layers = stacks.setdefault(match["stack"], {})
        layers.setdefault(int(match["index"]), {})[match["type"]] = entry
    if not stacks:
        raise UserError(f"BASE {base}: no layers found; tensors named like {_sample(outside)} are not a known layout")
    if len(stacks) > 1:
        names = ", ".join(f"{stack}*" for stack in sorted(stacks))
        raise UserError(
            f"BASE {base}: has {len(stacks)} stacks of layers ({names}); only models with one are supported"
        )
    stack, found = next(iter(stacks.items()))
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise UserError(f"BASE {base}: layer {stack}{missing[0]} is missing, though there is a layer {max(found)}")
    return stack, found, outside


def _first_alike(layers: list[dict[str, TensorEntry]]) -> int:
    """The first of the layers that are all like the last one, if these are more than those below them; else 0."""
    forms = [{name: (entry.dtype, entry.shape) for name, entry in layer.items()} for layer in layers]
    first = len(forms) - 1
    while first > 0 and forms[first - 1] == forms[-1]:
        first -= 1
    return first if 2 * first < len(forms) else 0


def _check_alike(
    base: str, stack: str, layers: list[dict[str, TensorEntry]], below: int, *, shapes: bool, hint: str
) -> None:
    """Raises: UserError if the layers from `below` on are not alike; `shapes`: in those too."""
    first = layers[below]
    for index in range(below + 1, len(layers)):
        layer = layers[index]
        for name in sorted(first.keys() ^ layer.keys()):
            have, lack = (below, index) if name in first else (index, below)
            raise UserError(
                f"BASE {base}: layers are not alike: {stack}{have}.{name} has no counterpart in layer {lack}{hint}"
            )
        for name, entry in layer.items():
            if entry.dtype != first[name].dtype or (shapes and entry.shape != first[name].shape):
                todo = hint if entry.shape != first[name].shape else ""
                raise UserError(
                    f"BASE {base}: layers are not alike: {entry.name} is {entry.dtype} {list(entry.shape)}, "
                    f"in layer {below} it is {first[name].dtype} {list(first[name].shape)}{todo}"
                )


def _weight_types(family: str, config: dict[str, Any], layers: list[dict[str, TensorEntry]]) -> dict[str, WeightType]:
    """The types of all layers by name, each as it is in the first layer that has it."""
    types: dict[str, WeightType] = {}
    for layer in layers:
        if layer.keys() <= types.keys():
            continue
        conv1d = _uses_conv1d(family, layer)
        experts, inputs_first = count_experts(layer), inputs_come_first(layer, config)
        for name, entry in layer.items():
            if name not in types:
                types[name] = _weight_type(entry, name, experts, conv1d=conv1d, inputs_first=inputs_first)
    return types


def _uses_conv1d(family: str, layer: dict[str, TensorEntry]) -> bool:
    """Whether weights named c_attn, c_proj, c_fc are stored (in, out). Their biases, as long as the outputs, tell."""
    for name, entry in layer.items():
        bias = layer.get(f"{name.removesuffix('.weight')}.bias")
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if bias is not None and module in _CONV1D_MODULES and len(entry.shape) == 2 and entry is not bias:
            rows, columns = entry.shape
            if rows != columns:
                return bias.shape == (columns,)
    return family in ("gpt2", "openai-gpt")


def _weight_type(
    entry: TensorEntry, name: str, experts: dict[str, int], *, conv1d: bool, inputs_first: bool
) -> WeightType:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if not entry.is_float or len(entry.shape) not in (1, 2):
        kind: Kind = "other"
    elif is_router(name, entry.shape, experts):
        kind = "router"
    else:
        kind = "matrix" if len(entry.shape) == 2 else "vector"
    transposed = inputs_first if item_of(name) is not None else conv1d and module in _CONV1D_MODULES
    return WeightType(name, entry.shape, entry.dtype, kind, transposed and kind == "matrix")


def _sample(names: list[str]) -> str:
    return ", ".join(sorted(names)[:2])
