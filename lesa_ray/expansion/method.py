"""What a method is, and the job it works on.

A method decides where new layers go by default, which of their tensors are copies, and how the others are made, split
into units: pieces of work that can run on different machines, each of which reads tensors and makes tensors. It knows
nothing of files, Ray or S3; the workbench hands it tensors. Three settings combine with any method and are therefore
decided here, in `Job.content`, not in one: positions, the rule for vectors, and zero-initialised output projections. So
are widths: where layers differ, a method sees all of them as wide as the widest (`expansion.widths`).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lesa_ray.checkpoint.anatomy import Anatomy, WeightType
from lesa_ray.checkpoint.residual import residual_writers
from lesa_ray.config import ExpandConfig, LesaSettings
from lesa_ray.errors import UserError
from lesa_ray.expansion.plan import (
    POSITIONS,
    New,
    Plan,
    between,
    gaps_by_importance,
    parse_gaps,
    target_layers,
)
from lesa_ray.expansion.widths import Widths

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float], None]
"""Told the name of the phase a unit is in and the share of the unit that is done, 0 … 1."""

Device = Literal["cpu", "cuda"]
VectorSource = Literal["lower", "mean", "first", "fused"]


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of the same weight type in a layer of the base."""

    layer: int


@dataclass(frozen=True, slots=True)
class Zero:
    """Zeros."""


@dataclass(frozen=True, slots=True)
class Made:
    """Made by a unit of the method."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that a unit leaves for later ones and that is no part of the result; float64."""

    name: str
    """Unique among all units."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """One piece of a method's work. `makes` holds (slot id, weight type) in the order in which they are written."""

    name: str
    makes: tuple[tuple[int, str], ...]
    flops: float
    """Rough arithmetic: the largest unit starts first."""
    memory: int
    """Rough peak in bytes beside the interpreter, where no GPU takes a part of it."""
    after: tuple[str, ...] = ()
    """Units whose tensors this one reads: slots of an earlier round, or what they keep."""
    keeps: tuple[Kept, ...] = ()
    """Left before what it makes, in this order."""
    reads: int = 0
    """Rough bytes read; 0: twice what it writes."""
    device_memory: int = 0
    """The part of `memory` that lies on a GPU instead, where the unit has one with room for it; 0: it makes no use of
    one, or its method counts for itself."""
    sized: bool = False
    """Whether what it makes has the slots' own widths (`Job.widths`), not the widest layer's."""

    @property
    def file(self) -> str:
        return re.sub(r"[^\w.-]", "_", self.name) + ".safetensors"


class Tensors(Protocol):
    """Where a unit gets its tensors and leaves them. Matrices are (d1, d2) = (out_features, in_features)."""

    def read(self, layer: int, weight_type: str, variant: int | None = None) -> torch.Tensor:
        """The tensor of a base layer or of a slot made earlier (by id), as stored; `variant`: of another checkpoint."""

    def write(self, slot: int, weight_type: str, tensor: torch.Tensor) -> None:
        """Leave one of the tensors that the unit makes; they come in the order of `Unit.makes`."""

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Leave one of the tensors of `Unit.keeps`, before all others, in their order."""

    def kept(self, name: str) -> torch.Tensor:
        """What an earlier unit kept, float64."""

    def name(self, layer: int, weight_type: str) -> str:
        """The tensor's name for messages."""


@dataclass(frozen=True)
class Job:
    """An expansion with everything decided: picklable, holds no weights."""

    config: ExpandConfig
    anatomy: Anatomy
    plan: Plan
    method: Method
    zero_init: bool
    vectors: VectorSource
    output_scale: float = 1.0
    """What new layers' output projections are multiplied by in the result, if they are not zero. Later slots are made
    from them as they were."""
    widths: Widths | None = None
    """Where layers differ in width: `anatomy` then has the widest layer's shapes. None: all layers are alike, or whole
    layers are copied."""

    @cached_property
    def whole_plan(self) -> Plan:
        """The plan with the layers that lie below those worked on: indices of the model's layers."""
        return self.plan.raised(self.anatomy.below)

    @cached_property
    def zeroed(self) -> frozenset[str]:
        """Weight types that are zero in new layers."""
        return frozenset(residual_writers(self.anatomy.types)) if self.zero_init else frozenset()

    @cached_property
    def scaled(self) -> frozenset[str]:
        """Weight types that are scaled in new layers."""
        return frozenset(residual_writers(self.anatomy.types)) if self.output_scale != 1 else frozenset()

    @cached_property
    def neighbours(self) -> frozenset[int]:
        """Slots from which later slots are made, so that all their tensors are needed, zeroed ones too."""
        used = {n for slot in self.plan.slots for n in (slot.lower, slot.upper) if n is not None}
        return frozenset(n for n in used if n >= self.plan.base_layers)

    def slot(self, layer: int) -> New:
        """The slot of that id."""
        return self.plan.slots[layer - self.plan.base_layers]

    def content(self, slot: New, weight_type: WeightType) -> Copy | Zero | Made:
        """What a tensor of a new layer is in the result."""
        return Zero() if weight_type.name in self.zeroed else self.substance(slot, weight_type)

    def substance(self, slot: New, weight_type: WeightType) -> Copy | Made:
        """The same before output projections are zeroed."""
        if weight_type.kind == "matrix" and not self.method.copies:
            return Made()
        if weight_type.kind == "vector" and self.vectors in ("mean", "fused"):
            return Made()
        if weight_type.kind == "vector" and self.vectors == "first":
            return Copy(0)
        return Copy(self.plan.origin(slot.lower))

    def must_make(self, slot: New, weight_type: WeightType) -> bool:
        """Whether a unit has to write this tensor: for the result, or for a later slot."""
        if isinstance(self.content(slot, weight_type), Made):
            return True
        return slot.id in self.neighbours and isinstance(self.substance(slot, weight_type), Made)

    def is_there(self, slot: New, weight_type: WeightType) -> bool:
        """Whether this tensor of a slot can be read when all units are done, zeroed ones as they were before."""
        return isinstance(self.substance(slot, weight_type), Copy) or self.must_make(slot, weight_type)

    def resizes(self, slot: New, weight_type: WeightType) -> bool:
        """Whether this tensor of the result is cut or widened after the method has made it."""
        changes = self.widths is not None and self.widths.changes(slot.id, weight_type.name)
        return changes and not isinstance(self.content(slot, weight_type), Zero)

    def shape(self, slot: New, weight_type: WeightType) -> tuple[int, ...]:
        """A tensor's shape in the result."""
        return weight_type.shape if self.widths is None else self.widths.shape(weight_type, self.widths.of(slot.id))

    def share(self, layer: int, weight_type: str) -> float:
        """How much of a layer's tensor, as a method reads it, is not padding: 1 where layers are alike."""
        if self.widths is None or layer >= self.plan.base_layers:
            return 1.0
        padded = self.anatomy.types[weight_type]
        return math.prod(self.widths.shape(padded, self.widths.of(layer))) / math.prod(padded.shape)

    def makes(self, slots: tuple[New, ...], types: tuple[WeightType, ...]) -> tuple[tuple[int, str], ...]:
        return tuple((slot.id, t.name) for slot in slots for t in types if self.must_make(slot, t))


class Method(ABC):
    """One way to fill slots. Adding one is a file with a subclass and a line in the registry."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    """Where it is published; empty for what is this project's own."""
    position: ClassVar[str]
    """Where new layers go as published; shown to users."""
    zero_init: ClassVar[bool]
    vectors: ClassVar[VectorSource]
    copies: ClassVar[bool] = False
    """Whether new layers are copies of an old one, so that there is nothing to compute."""
    trains: ClassVar[Literal["new", "all"]] = "new"
    """What the paper trains afterwards."""
    minimum_layers: ClassVar[int] = 2
    draws: ClassVar[bool] = True
    """Whether what it makes depends on the seed."""
    predicts: ClassVar[bool] = False
    """Whether it trains predictors, so that the settings under `lesa`, and variants, are its."""
    pads: ClassVar[bool] = True
    """Whether it can work on layers that differ in width, padded with zero neurons and heads."""
    averages_vectors: ClassVar[bool] = False
    """Whether its units make the means of vectors (`vectors: mean`) themselves."""

    def plan(self, base_layers: int, layers: int, position: str | None) -> Plan:
        """Where the new layers go. Raises: UserError."""
        return between(base_layers, layers, position or self.position)

    @abstractmethod
    def units(self, job: Job) -> list[Unit]:
        """The pieces of work; none where all is copied."""

    def choices(self, job: Job) -> dict[str, str]:
        """What the method decides by settings that do not count for the result otherwise, such as the memory budget."""
        return {}

    def fitted(self, job: Job, unit: Unit) -> tuple[WeightType, ...]:
        """The matrices, as they are decomposed, to whose layers a unit fits a predictor; none for other work."""
        return ()

    def run(self, unit: Unit, job: Job, tensors: Tensors, context: RunContext) -> dict[str, Any]:
        """Do one unit's work and return what is worth reporting: plain JSON, the same for the same inputs and seed.

        A unit of several fits reports each by its name, under `fits`."""
        raise NotImplementedError(f"{self.name} has no units")


@dataclass(frozen=True)
class RunContext:
    """What the place where a unit runs gives it."""

    device: Device = "cpu"
    device_memory: int = 0
    """Bytes of the GPU that are the unit's; without a GPU 0."""
    scratch_dir: str | None = None
    memory_budget: int | None = None
    progress: Progress | None = None


def check_settings(config: ExpandConfig, method: Method) -> None:
    """Raises: UserError for settings that the method would not look at."""
    if method.predicts:
        return
    if config.variants:
        raise UserError(f"--variants: {method.name} trains no predictor, so it has no use for them; lesa has")
    given = config.lesa.model_dump().items() - LesaSettings.from_recipe(config.recipe).model_dump().items()
    if given:
        names = ", ".join(sorted(name for name, _ in given))
        raise UserError(f"{names}: a setting of lesa, {method.name} has no use for it")


def make_job(config: ExpandConfig, anatomy: Anatomy, method: Method, influence: Sequence[float] | None = None) -> Job:
    """Decide everything about an expansion. influence: of each layer, for a position by importance.

    Raises: UserError for settings that do not fit the base or the method."""
    if anatomy.layers < method.minimum_layers:
        alike = f" {anatomy.layers} alike" if anatomy.below else f" {anatomy.layers}"
        raise UserError(f"{method.name}: needs at least {method.minimum_layers} layers, the base has{alike}")
    layers = target_layers(anatomy.depth, config.factor, config.layers, config.position)
    position = config.position
    if influence is not None and position is not None:
        position = gaps_by_importance(position, influence[anatomy.below :], layers - anatomy.depth)
    elif anatomy.below and position is not None and position not in POSITIONS:
        position = _above(anatomy, position)
    return Job(
        config=config,
        anatomy=anatomy,
        plan=method.plan(anatomy.layers, layers - anatomy.below, position),
        method=method,
        zero_init=_zero_init(config, method),
        vectors=config.vectors or ("first" if _first_vectors(config) else method.vectors),
        output_scale=config.output_scale or 1.0,
    )


def _above(anatomy: Anatomy, position: str) -> str:
    """Gaps of the whole model as gaps of the layers that are worked on. Raises: UserError for one beneath them."""
    gaps = parse_gaps(position, anatomy.depth)
    if gaps[0] < anatomy.below:
        raise UserError(
            f"--position {position}: gap {gaps[0]} is out of range: layers below layer {anatomy.below} have other "
            f"tensors than those above, and no layer can be made from both; gaps run from {anatomy.below} to "
            f"{anatomy.depth - 2}"
        )
    return ",".join(str(gap - anatomy.below) for gap in gaps)


def _zero_init(config: ExpandConfig, method: Method) -> bool:
    if config.output_scale is not None:
        return config.output_scale == 0
    return method.zero_init if config.zero_init is None else config.zero_init


def _first_vectors(config: ExpandConfig) -> bool:
    """LESA's released code deep-copies layer 0 for whatever is not predicted (load_LESA.ipynb)."""
    return config.recipe == "released-code" and config.method == "lesa"
