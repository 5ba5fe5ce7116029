"""The spectral route of a unit: by which way its basis is found, and with how many directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lesa_ray.lesa.bounds import EIGH_MATRICES
from lesa_ray.lesa.operations import gram_flops, project_flops, range_flops
from lesa_ray.lesa.task import Task, layers_in_flight

Route = Literal["gram", "randomized", "exact", "none"]

GRAM_ALWAYS = 2048
"""Up to this d1, eigh takes about two seconds on one core, and its exactness is worth more than a rank's saving."""
GRAM_MEMORY = 32 * 2**30
"""Bytes for which `auto` takes the Gram route without a budget, if there is a rank to avoid it by: d1 up to 32,768."""
EXACTNESS = 4
"""`auto` takes the randomised route to save time only for a rank below this part of all directions: its frame is
accurate where many directions are left out, and of few the Gram route finds the very ones."""

_REFERENCE = {"half": 110e9, "fp32": 110e9, "fp64": 60e9, "eigh": 45e9}
"""Operations a second by which routes are compared: a CPU core's. Fixed, so that the choice, and with it every byte of
the result, is the same on every machine. A GPU is still slower in eigh, against its products."""


def choose_route(
    d1: int,
    d2: int,
    layers: int,
    rank: int | None,
    *,
    element_bytes: int = 2,
    oversampling: int = 10,
    power_iterations: int = 2,
    memory_budget: int | None = None,
) -> Literal["gram", "randomized"]:
    """The route that `auto` takes: the faster of those whose working set fits, from sizes alone.

    Without a rank that is `gram`: keeping every direction, it is the cheapest way there is. `exact` is never chosen: it
    gives the same to rounding, slower.

    memory_budget: bytes; without one, `gram` may take `GRAM_MEMORY`, and any amount where there is no rank.
    """
    directions = min(d1, layers * d2)
    if rank is None or rank >= directions:
        return "gram"
    rows = min(rank + oversampling, directions)
    if layers_in_flight(d1, d2, element_bytes) + EIGH_MATRICES * 8 * d1 * d1 > (memory_budget or GRAM_MEMORY):
        return "randomized"
    if d1 <= GRAM_ALWAYS or rank * EXACTNESS > min(d1, layers * d2):
        return "gram"
    gram = gram_flops(d1, d2, layers, element_bytes, "cpu"), project_flops("gram", d1, d2, layers, rank, rows)
    other = (
        range_flops(d1, d2, layers, rows, power_iterations),
        project_flops("randomized", d1, d2, layers, rank, rows),
    )
    return "randomized" if _reference_seconds(*other) < _reference_seconds(*gram) else "gram"


def route_of(task: Task) -> Route:
    """The spectral route: the one the settings name, or what `auto` takes."""
    s = task.settings
    if s.svd != "auto":
        return s.svd
    return choose_route(
        task.d1,
        task.d2,
        task.basis * task.layers,
        s.rank,
        element_bytes=task.element_bytes,
        oversampling=s.oversampling,
        power_iterations=s.power_iterations,
        memory_budget=task.memory_budget,
    )


def sizes_of(task: Task) -> tuple[Route, int, int]:
    """The route, the directions that are kept, and those that are held until they are turned."""
    s, own, route = task.settings, task.basis * task.layers, route_of(task)
    directions = task.d1 if route == "none" else min(task.d1, own * task.d2)
    rank = min(s.rank or directions, directions)
    return route, rank, min(rank + s.oversampling, directions) if route == "randomized" else rank


def _reference_seconds(*flops: Mapping[str, float]) -> float:
    return sum(count / _REFERENCE[kind] for one in flops for kind, count in one.items())
