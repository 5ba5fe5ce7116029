"""What is analysed: a checkpoint by its headers, its weight types, and how one of them is worked on.

Layers of a layer-wise scaled model that differ in width are padded with zeros to the widest, as `lesa_ray.expansion`
pads them, so that what is measured is what a method would see; norms, spectra and ranks are those of the layers alone.

Where layers are of several kinds, a type's figures are of the layers that have it; predictors are fitted to types that
lie in layers in a row, and layers are not matched.

Types are independent of one another, so each may be a task of its own. A type's layers are read several times (singular
values, the passes of the common basis, the fit); where all of them take at most a quarter of the memory budget they are
read once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lesa_ray.analysis.heldout import held_out_fit
from lesa_ray.analysis.likeness import match_block
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.analysis.weight_type import DIRECTIONS, among, analyse_type
from lesa_ray.checkpoint.anatomy import Anatomy, WeightType, read_anatomy
from lesa_ray.checkpoint.blocks import Attention, Block, Mlp, read_blocks
from lesa_ray.checkpoint.finite import assert_finite
from lesa_ray.checkpoint.header import FLOAT_BYTES
from lesa_ray.checkpoint.manifest import MANIFEST_FILE, own_manifest
from lesa_ray.checkpoint.reader import Checkpoint, open_checkpoint
from lesa_ray.config import LesaSettings
from lesa_ray.errors import UserError
from lesa_ray.expansion.memory import default_budget
from lesa_ray.expansion.widths import Width, Widths, read_widths
from lesa_ray.layerwise.names import MODEL_TYPE
from lesa_ray.lesa.alignment import Layer
from lesa_ray.lesa.cost import unit_cost
from lesa_ray.lesa.streams import Load, only
from lesa_ray.lesa.task import Task
from lesa_ray.scratch import scratch_dir

SMALL = 200_000_000
"""Weights in all layers up to which predictors are fitted and layers matched unless told otherwise."""
KEPT_SHARE = 0.25
"""Of the memory budget, for layers that are read once and kept."""
_IN_A_ROW = 3
"""Old layers from which a predictor can learn."""
_ONE_WIDTH = f"; analyze needs layers of one width, or those of a {MODEL_TYPE} model, with the same KV heads in all"


@dataclass(frozen=True)
class Subject:
    """A checkpoint to analyse. Picklable, holds no weights."""

    config: AnalyzeConfig
    checkpoint: Checkpoint
    anatomy: Anatomy
    """With the widest layer's shapes."""
    widths: Widths | None = None
    """Of the layers, where they differ."""

    @cached_property
    def types(self) -> dict[str, tuple[WeightType, ...]]:
        """The matrices by name; experts of a kind are one type, `experts.*`."""
        return self.anatomy.kinds

    @cached_property
    def new_layers(self) -> list[int]:
        """Layers that `expansion.json` calls new, where there is one. Raises: UserError if it is another model's."""
        if MANIFEST_FILE not in self.checkpoint.files:
            return []
        where = f"BASE {self.config.base}"
        manifest = own_manifest(self.checkpoint.storage, self.anatomy.layers, where, needed=True)
        return manifest["new_layers"] if manifest is not None else []

    @property
    def is_small(self) -> bool:
        """Whether what takes long is done without being asked for."""
        return sum(len(self.anatomy.layers_with(t.name)) * t.d1 * t.d2 for t in self.anatomy.matrices) <= SMALL

    @cached_property
    def old_layers(self) -> list[int]:
        """The others: the base's, in its order."""
        return [layer for layer in range(self.anatomy.layers) if layer not in self.new_layers]

    def layers_with(self, name: str) -> list[int]:
        """Those that have a type: all, where layers are alike."""
        return self.anatomy.layers_with(*(member.name for member in self.types[name]))

    def in_a_row(self, name: str) -> bool:
        """Whether old layers with a type follow one another, and are enough for a predictor."""
        having = {*self.layers_with(name)}
        places = [at for at, layer in enumerate(self.old_layers) if layer in having]
        return len(places) >= _IN_A_ROW and places[-1] - places[0] == len(places) - 1

    @property
    def why_not_fitted(self) -> str | None:
        """Why predictors are not fitted, or None."""
        if not (self.is_small if self.config.fit is None else self.config.fit):
            return "not asked for" if self.config.fit is None else "not wanted"
        if len(self.old_layers) < _IN_A_ROW:
            of = "old layers of a grown model" if self.new_layers else "layers"
            return f"a predictor learns from three layers in a row; there are {len(self.old_layers)} {of}"
        if not any(map(self.in_a_row, self.types)):
            return "a predictor learns from three layers in a row; no weight type lies in so many"
        return None

    @cached_property
    def fitted(self) -> frozenset[str]:
        """Types to which predictors are fitted."""
        return frozenset(filter(self.in_a_row, self.types)) if self.why_not_fitted is None else frozenset()

    @property
    def why_not_matched(self) -> str | None:
        """Why layers are not matched, or None."""
        if not (self.is_small if self.config.match is None else self.config.match):
            return "not asked for" if self.config.match is None else "not wanted"
        try:
            read_blocks(self.anatomy, "analyze")
        except UserError as error:
            return str(error).removeprefix("analyze: ").removesuffix("; use another method")
        return None

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """What is matched, each a piece of work; empty where layers are not matched."""
        if self.why_not_matched is not None:
            return {}
        attention, mlp = read_blocks(self.anatomy, "analyze")
        return {"attention, matched": attention, "mlp, matched": mlp}

    def nbytes(self, name: str) -> int:
        """Of a type's matrices in all layers, as they are stored."""
        return len(self.layers_with(name)) * sum(t.d1 * t.d2 * FLOAT_BYTES[t.dtype] for t in self.types[name])

    def keeps(self, name: str, budget: int | None) -> bool:
        """Whether a type's layers are read once and kept, in a budget of so many bytes; None: any."""
        return budget is None or self.nbytes(name) <= KEPT_SHARE * budget

    def left(self, name: str, budget: int | None) -> int | None:
        """Of the budget, beside what is kept."""
        return budget - self.nbytes(name) if budget is not None and self.keeps(name, budget) else budget

    def memory(self, name: str) -> int:
        """Rough peak in bytes of host memory that a piece of work takes beside the interpreter.

        A type: the layers, if they are kept in the budget that was stated, and the larger of the common basis and the
        fit, by LESA's cost model. A block: some layers in float32, and the similarities of its neurons or head rows.
        """
        if name in self.blocks:
            block = self.blocks[name]
            elements = [self.anatomy.types[matrix].d1 * self.anatomy.types[matrix].d2 for matrix in block.matrices]
            private = max(self.anatomy.types[m].d1 for m in block.named("q", "gate", "up"))
            return 48 * sum(elements) + 24 * private * private
        members, budget = self.types[name], self.config.memory_budget
        task = Task(
            d1=members[0].d1,
            d2=len(members) * members[0].d2,
            layers=len({*self.old_layers}.intersection(self.layers_with(name))),
            slots=0,
            settings=LesaSettings(rank=min(DIRECTIONS, members[0].d1), ridge_yardstick=False),
            element_bytes=FLOAT_BYTES[members[0].dtype],
            memory_budget=self.left(name, budget),
        )
        needed = unit_cost(task).host_memory
        if name in self.fitted:
            fit = replace(
                task, d2=members[0].d2, settings=self.config.lesa, checkpoints=len(members), basis=len(members)
            )
            needed = max(needed, unit_cost(fit).host_memory)
        return needed + (self.nbytes(name) if self.keeps(name, budget) else 0)

    @property
    def old_widths(self) -> set[Width]:
        """Of the layers that no method put in, where layers differ."""
        base = () if self.widths is None else self.widths.base
        return {base[layer] for layer in self.old_layers} if base else set()

    def shapes(self, name: str) -> list[tuple[int, int]] | None:
        """A type's in each layer as it is stored, where they differ."""
        if self.widths is None:
            return None
        (one,) = self.types[name]
        found = [(rows, columns) for rows, columns in (self.widths.shape(one, width) for width in self.widths.base)]
        return found if len({*found}) > 1 else None

    def evened(self, block: Block, layer: int, below: Layer, above: Layer) -> tuple[Layer, Layer, Block]:
        """Two neighbours' matrices, `above` those of `layer`, padded to the wider's width, and the block so wide."""
        assert self.widths is not None
        pair = replace(self.widths, base=self.widths.base[layer - 1 : layer + 1])
        lower, upper = (
            {name: pair.padded(name, at, tensor) for name, tensor in one.items()}
            for at, one in enumerate((below, above))
        )
        return lower, upper, _as_wide(block, pair.widest)

    def read(self, layer: int, weight_type: WeightType) -> Tensor:
        """(d1, d2), as wide as it is stored. Raises: UserError if it is not finite."""
        name = self.anatomy.name(layer, weight_type.name)
        tensor = self.checkpoint.read(name)
        assert_finite(tensor, name)
        return tensor.T.contiguous() if weight_type.transposed else tensor

    def loads(self, name: str, kept: dict[tuple[str, int], Tensor] | None) -> list[Load]:
        """How the matrices of a type's members are read: place among the layers that have it → (d1, d2), all of one
        width. `kept`: where they stay, if they do."""
        layers = self.layers_with(name)

        def reader(weight_type: WeightType) -> Load:
            def load(place: int) -> Tensor:
                layer = layers[place]
                if kept is not None and (weight_type.name, layer) in kept:
                    return kept[weight_type.name, layer]
                tensor = self.read(layer, weight_type)
                if self.widths is not None:
                    tensor = self.widths.padded(weight_type.name, layer, tensor)
                if kept is not None:
                    kept[weight_type.name, layer] = tensor
                return tensor

            return load

        return [reader(weight_type) for weight_type in self.types[name]]


def open_subject(config: AnalyzeConfig) -> Subject:
    """Open the checkpoint by its headers. Raises: UserError."""
    checkpoint = open_checkpoint(config.base)
    is_scaled = checkpoint.config.get("model_type") == MODEL_TYPE
    anatomy, widths = read_anatomy(checkpoint, differ="shapes" if is_scaled else "tensors", hint=_ONE_WIDTH), None
    if is_scaled:
        widths = read_widths(checkpoint, anatomy, _ONE_WIDTH)
        anatomy = replace(anatomy, types=widths.padded_types(anatomy.types))
    else:
        _check_one_shape(checkpoint, anatomy)
    subject = Subject(config, checkpoint, anatomy, None if widths is None or widths.are_even else widths)
    if not subject.types:
        raise UserError(f"BASE {config.base}: its layers have no matrix to look at")
    _ = subject.new_layers  # read here, so that what is wrong with it is found before anything begins
    if config.fit and (why := subject.why_not_fitted) is not None:
        raise UserError(f"--fit: BASE {config.base}: {why}")
    if config.match:
        read_blocks(anatomy, "--match")
    return subject


def _check_one_shape(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Raises: UserError if a type has several shapes or dtypes."""
    for layer in range(anatomy.layers):
        for weight_type in anatomy.types_of(layer):
            name = anatomy.name(layer, weight_type.name)
            found, first = checkpoint.entry(name), weight_type
            if (found.dtype, found.shape) != (first.dtype, first.shape):
                hint = _ONE_WIDTH if found.shape != first.shape else "; analyze needs one dtype for a weight type"
                raise UserError(
                    f"BASE {checkpoint.base}: layers are not alike: {name} is {found.dtype} {list(found.shape)}, in a "
                    f"layer below it is {first.dtype} {list(first.shape)}{hint}"
                )


def work_on_type(
    subject: Subject, name: str, device: str, progress: Callable[[str, float], None] = lambda phase, share: None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The schema's `types[name]` and `fit[name]` (None without a fit). Raises: UserError, MachineError.

    Of a grown model the fit is that of the old layers, as they followed one another in the base: a copy is predicted by
    repeating its neighbour, and what a predictor made by that predictor."""
    config, layers = subject.config, subject.layers_with(name)
    budget = config.memory_budget or default_budget()
    loads = subject.loads(name, {} if subject.keeps(name, budget) else None)

    def side_by_side(layer: int) -> Tensor:
        return loads[0](layer) if len(loads) == 1 else torch.cat([load(layer) for load in loads], dim=1)

    share = 0.5 if name in subject.fitted else 1.0
    new = {*subject.new_layers}
    old = [place for place, layer in enumerate(layers) if layer not in new]
    scratch = scratch_dir()
    left = subject.left(name, budget)
    figures = analyse_type(
        side_by_side,
        len(layers),
        new=[place for place, layer in enumerate(layers) if layer in new],
        shapes=subject.shapes(name),
        members=len(loads),
        seed=config.seed,
        device=device,
        scratch_dir=scratch,
        memory_budget=left,
        progress=lambda phase, done: progress(phase, share * done),
    )
    fit = None
    if name in subject.fitted:
        fit = held_out_fit(
            [only(load, old) for load in loads],
            len(old),
            config.lesa,
            config.seed,
            device=device,
            scratch_dir=scratch,
            memory_budget=left,
            progress=lambda phase, done: progress(phase, 0.5 + 0.5 * done),
        )
    return asdict(among(figures, layers, subject.anatomy.layers)), fit


def work_on_block(
    subject: Subject, piece: str, device: str, progress: Callable[[str, float], None] = lambda phase, share: None
) -> dict[str, Any]:
    """`likeness.BlockFigures` of one of the subject's blocks. Raises: UserError, MachineError."""
    block = subject.blocks[piece]

    def load(layer: int) -> dict[str, Tensor]:
        return {name: subject.read(layer, subject.anatomy.types[name]) for name in block.matrices}

    layers, seed = subject.anatomy.layers, subject.config.seed
    evened, old = None, subject.old_widths
    if len(old) > 1:
        evened = partial(subject.evened, block)
    elif old:
        block = _as_wide(block, *old)
    figures = match_block(
        load, layers, block, seed, new=subject.new_layers, evened=evened, device=device, progress=progress
    )
    return asdict(figures)


def _as_wide(block: Block, width: Width) -> Block:
    """The block in a layer of that width."""
    if isinstance(block, Mlp):
        return replace(block, neurons=width.neurons)
    assert isinstance(block, Attention)
    return replace(block, heads=width.heads)
