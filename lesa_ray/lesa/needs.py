"""The memory that a unit needs beside its coefficients, and where those lie for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lesa_ray.gpu import DEVICE_SHARE
from lesa_ray.lesa.bounds import CUSOLVER_ROWS, EIGH_MATRICES, GRAM_BLOCK, RIDGE_BLOCK, RIDGE_FEATURES, SPLIT_MATRICES
from lesa_ray.lesa.route import Route, sizes_of
from lesa_ray.lesa.task import Task, layers_in_flight, predictor_weights, side_by_side, triples_of, word_of
from lesa_ray.sizes import size as size_text

Place = Literal["device", "memory", "scratch"]
"""Where the coefficients lie: on the GPU, in host memory, in a file in node-local scratch."""


@dataclass(frozen=True)
class Needs:
    """Peak bytes of the phases of a fit, or of those side by side, where it computes, beside the coefficients and
    beside `others`."""

    others: int
    """What the other fits of a stack keep."""
    gram: int
    eigh: int
    project: int
    """Without the layers that are read again."""
    train: int
    ridge: int
    """Of the yardsticks, with ridge."""
    yardsticks: int
    predict: int
    rival: bool
    """Whether ridge is a yardstick."""
    early: int
    """The most of all phases, and `others`, from the Gram matrix on."""
    late: int
    """And from the projection of all layers on."""


def needs_of(task: Task, route: Route, rank: int, rows: int) -> Needs:
    """By `sizes_of`."""
    s, d1, d2, word, weights = task.settings, task.d1, task.d2, word_of(task), predictor_weights(task)
    stack = side_by_side(s, task.device, task.fits)
    frame = 0 if route == "none" else word * d1 * rows
    others = (stack - 1) * (frame + word * weights)
    flight = layers_in_flight(d1, d2, task.element_bytes)
    block = 12 * GRAM_BLOCK[task.device] * d1  # a product in float32 and as doubles
    gram, eigh = flight + block + 8 * d1 * d1, eigh_bytes(d1, task.device)
    project = word * (d1 * d2 + 2 * rows * d2) + frame * (7 if route == "randomized" else 1)

    system = d2 * (32 * d2 + 48 * min(RIDGE_BLOCK, 2 * d2)) + 2 * word * rank * d2  # of ridge, in float64
    solution, scores = 2 * word * d2 * d2, 12 * word * rank * d2
    by_ridge = s.predictor == "ridge"
    ridge = frame + max(system, solution + scores)
    wanted = s.ridge_yardstick and not by_ridge and 2 * d2 <= RIDGE_FEATURES[task.device]
    rival = wanted and (task.device == "cpu" or ridge + others <= DEVICE_SHARE * task.device_memory)
    if by_ridge:
        train = frame + system
    else:
        samples = triples_of(task)[0] * rank
        batch = 8 * word * s.batch_size * (3 * d2 + s.hidden)
        train = frame + stack * (4 * word * weights + 64 * samples + batch)
    yardsticks = ridge if rival else frame + scores + (solution if by_ridge else 0)
    predict = frame + word * (6 * rank * d2 + 3 * d1 * d2) + (solution if by_ridge else 0)

    later = max(train, yardsticks, predict)
    again = flight if task.checkpoints > task.basis else 0
    early = others + max(gram, eigh, project + again, later)
    late = others + max(project + flight, later)
    return Needs(others, gram, eigh, project, train, ridge + others, yardsticks, predict, rival, early, late)


def bytes_beside(task: Task) -> tuple[int, int]:
    """What is needed beside the coefficients where the unit computes, from when they take their place on, at the peak
    of each phase: if they take it before the Gram matrix is summed, and if after the basis was found."""
    needs = needs_of(task, *sizes_of(task))
    return needs.early, needs.late


def choose_place(size: int, beside: int, budget: int | None, fits_gpu: Callable[[int], bool] | None) -> Place:
    """Where coefficients of `size` bytes lie when `beside` more are needed where the unit computes.

    budget: bytes of host memory; None: no limit. fits_gpu: whether as many bytes fit on the GPU; None without one."""
    if fits_gpu is not None and fits_gpu(size + beside):
        return "device"
    needed = size + (beside if fits_gpu is None else 0)
    return "memory" if budget is None or needed <= budget else "scratch"


def place_for(task: Task, size: int, beside: int) -> Place:
    """`choose_place` with what belongs to a unit."""

    def fits(nbytes: int) -> bool:
        return nbytes <= DEVICE_SHARE * task.device_memory

    return choose_place(size, beside, task.memory_budget, fits if task.device == "cuda" else None)


def eigh_bytes(d1: int, device: str) -> int:
    """Of a Gram matrix while its eigenvectors are found: the matrix, in which they come back, and a workspace."""
    return (SPLIT_MATRICES if device == "cuda" and d1 > CUSOLVER_ROWS else EIGH_MATRICES) * 8 * d1 * d1


def why_no_room_for_ridge(task: Task) -> str | None:
    """Why ridge is no yardstick for want of the GPU's memory, wherever the coefficients lie, or None."""
    if task.device == "cpu":
        return None
    needed, most = needs_of(task, *sizes_of(task)).ridge, int(DEVICE_SHARE * task.device_memory)
    return f"takes {size_text(needed)} of a GPU; there are {size_text(most)} for it" if needed > most else None


def frame_bytes(d1: int, d2: int, rows: int) -> int:
    """The randomised range finder: the sample, QR's copies and its answer in float64, the frame and Ω in float32."""
    return rows * (28 * d1 + 4 * d2)
