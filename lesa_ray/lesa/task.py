"""A unit of LESA's work in figures, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lesa_ray.config import LesaSettings
from lesa_ray.lesa.bounds import STACKED_ON


@dataclass(frozen=True)
class Task:
    """A unit: the matrices (d1, d2) of a weight type in all layers, and the slots to fill."""

    d1: int
    d2: int
    layers: int
    slots: int
    settings: LesaSettings = field(default_factory=LesaSettings)
    checkpoints: int = 1
    """The base, its variants, or the experts that share a predictor."""
    basis: int = 1
    """How many of them the basis is of."""
    fits: int = 1
    """Bases with their predictors: 1, or experts of a kind each with its own. All above but `slots` is of one."""
    element_bytes: int = 2
    """Of the stored weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    memory_budget: int | None = None
    """Bytes of host memory for the unit; without one everything may lie there."""
    device_memory: int = 0
    """Bytes of the GPU; without a GPU 0."""


def side_by_side(settings: LesaSettings, device: str, fits: int) -> int:
    """How many of a unit's fits are done at once on a kind of device."""
    return fits if settings.predictor == "mlp" and device in STACKED_ON else 1


def held_out_triples(triples: int, holdout: float) -> int:
    """How many of them are kept from training: at least one if `holdout` is above 0, never all."""
    return min(max(round(holdout * triples), 1), triples - 1) if holdout > 0 else 0


def triples_of(task: Task) -> tuple[int, int]:
    """How many are trained on, and how many held out."""
    triples, copies = task.basis * (task.layers - 2), task.checkpoints // task.basis
    held_out = held_out_triples(triples, task.settings.holdout)
    return copies * (triples - held_out), copies * held_out


def word_of(task: Task) -> int:
    """Bytes of a coefficient: float32, or float64 where the weights are."""
    return 8 if task.element_bytes == 8 else 4


def predictor_weights(task: Task) -> int:
    """Of a predictor; its few biases left out."""
    return task.settings.hidden * (3 * task.d2 + task.settings.hidden)


def layers_in_flight(d1: int, d2: int, element_bytes: int) -> int:
    """Bytes of the layer in use, the next, the one the reader holds, and the copy that is multiplied."""
    return d1 * d2 * (3 * element_bytes + (4 if element_bytes == 2 else 8))
