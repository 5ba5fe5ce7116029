"""What LESA costs for one unit of work, from sizes alone: operations, bytes and peak memory, phase by phase.

The phases are those of `spectral`, `fit` and the writing of the result. What each does is counted and not measured, so
that `auto` chooses a spectral route, Ray is told how much memory a unit takes, and `inspect` predicts a run, all by one
model and before anything is read. The route follows from `route`, the memory of a phase from `needs`; how long a count
takes on a machine is `rates`' part. None of them imports torch.

n layers of (d1, d2), r directions, t triples that are trained on, P weights of the predictor of width h, for each
basis with its predictor (a unit of several experts has several):

gram        n·d1·(d1 + block)·d2 operations (the lower half alone), d1²·8 bytes
eigh        9·d1³, float64; the matrix, where the eigenvectors come back, and two of its size as workspace: d1²·24 bytes
            (twice that on a GPU above `CUSOLVER_ROWS`)
range       (2 + 4·iterations)·n·d1·d2·rows, and a QR of (d1, rows) after each pass
project     2·n·d1·d2·rows; the randomised route then turns its frame
train       t·r·epochs·h·(14·d2 + 6·h), the first layer having no gradient towards its input
yardsticks  ridge: about 5·t·r·d2² and (2·d2)³/3 + 8·d2³; scores: 4·r·d2² a triple by ridge, 2·r·P by the predictor
predict     2·r·P + 2·d1·r·d2 a slot
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lesa_ray.budget import require_budget
from lesa_ray.errors import RoomError
from lesa_ray.gpu import DEVICE_SHARE
from lesa_ray.lesa.bounds import EIGH_MATRICES, SCORED
from lesa_ray.lesa.needs import Place, frame_bytes, needs_of, place_for
from lesa_ray.lesa.operations import gram_flops, project_flops, range_flops, ridge_flops
from lesa_ray.lesa.route import Route, sizes_of
from lesa_ray.lesa.task import Task, layers_in_flight, predictor_weights, side_by_side, triples_of, word_of
from lesa_ray.sizes import size as size_text

STACK = 16
"""Most fits that a unit of several does side by side: at 64 rows each their products then fill a GPU, and a mixture of
128 experts still makes 24 units to share among GPUs. Reckoned, not measured."""
STACK_BYTES = 8 * 2**30
"""And most that they keep: what is larger fills a GPU sooner by itself. Both are fixed and no GPU's own, so that the
units, and with them every byte of the result, are the same on all GPUs of a kind."""
STEP_WORDS = 10
"""Words of memory that pass for each weight in a step of a stack: one read or two by the products, the gradient
written, AdamW's four reads and three writes. A single predictor's stay in a processor's cache."""


@dataclass(frozen=True)
class Phase:
    """One phase's work and the memory at its peak, in bytes, beside the interpreter."""

    name: str
    host: int
    device: int
    flops: Mapping[str, float] = field(default_factory=dict)
    """Operations by the kind of work, as `Rates` names them: half, fp32, fp64, eigh, eigh_host, narrow."""
    traffic: float = 0.0
    """Bytes of memory read and written in element-wise work."""
    steps: int = 0
    """Of the predictor's training."""
    moved: float = 0.0
    """Bytes of coefficients read and written, which take time of their own where they lie elsewhere."""
    read_bytes: int = 0
    """From storage, beside the arithmetic."""
    write_bytes: int = 0


@dataclass(frozen=True)
class UnitCost:
    """All phases of a unit in their order."""

    route: Route
    rank: int
    coefficients: Place
    coefficient_bytes: int
    layer_bytes: int
    """One layer as it is stored."""
    phases: tuple[Phase, ...]

    @property
    def flops(self) -> float:
        return sum(sum(phase.flops.values()) for phase in self.phases)

    @property
    def host_memory(self) -> int:
        """Peak beside the interpreter, without the pages of a scratch file, which the kernel can drop."""
        return max(phase.host for phase in self.phases)

    @property
    def device_memory(self) -> int:
        return max(phase.device for phase in self.phases)

    @property
    def read_bytes(self) -> int:
        return sum(phase.read_bytes for phase in self.phases)

    @property
    def write_bytes(self) -> int:
        return sum(phase.write_bytes for phase in self.phases)


def unit_cost(task: Task) -> UnitCost:
    """Work and memory of one unit."""
    s, d1, d2 = task.settings, task.d1, task.d2
    n, own = task.checkpoints * task.layers, task.basis * task.layers
    stack, slots = side_by_side(s, task.device, task.fits), task.slots // task.fits
    route, rank, rows = sizes_of(task)
    needs = needs_of(task, route, rank, rows)
    word = word_of(task)
    row = word * d2
    layer, of_one = d1 * d2 * task.element_bytes, n * rows * d2 * word
    size = stack * of_one
    weights = predictor_weights(task)

    # As Room decides: where the layers of the first pass can wait in the coefficients' place, they are read once.
    early = place_for(task, size, needs.early)
    held = route == "gram" and early != "scratch" and rows * word >= d1 * task.element_bytes
    place = early if held else place_for(task, size, needs.late)
    flight = layers_in_flight(d1, d2, task.element_bytes)
    gpu = task.device == "cuda"

    def phase(
        name: str, work: int, *, keeps: bool = True, on_host: int = 0, flops: Mapping[str, float], **figures: float
    ) -> Phase:
        """work: peak bytes where the unit computes, beside the coefficients if it `keeps` them; on_host: in memory
        with a GPU too. flops, figures: of one fit."""
        work += needs.others
        host = on_host + (flight if gpu else work) + (size if keeps and place == "memory" else 0)
        device = work + (size if keeps and place == "device" else 0) if gpu else 0
        all_flops = {kind: task.fits * count for kind, count in flops.items()}
        scaled: dict[str, Any] = {kind: task.fits * figure for kind, figure in figures.items()}
        return Phase(name, host, device, all_flops, **scaled)

    trained, held_out = triples_of(task)
    samples = trained * rank
    ridge_moved = 5.0 * min(n, 2 * trained) * rank * row  # layers that normal equations take up

    phases = []
    if route == "gram":
        matrix = 8 * d1 * d1
        most = DEVICE_SHARE * task.device_memory
        away, eigh_away = gpu and EIGH_MATRICES * matrix > most, gpu and needs.eigh > most
        phases += [
            phase(
                "gram",
                needs.gram - (matrix if away else 0),
                keeps=held,
                on_host=matrix if away else 0,
                flops=gram_flops(d1, d2, own, task.element_bytes, task.device),
                traffic=own * (6.0 * d1 * d2 + 12.0 * d1 * d1),
                read_bytes=own * layer,
            ),
            phase(
                "eigh",
                0 if eigh_away else needs.eigh,
                keeps=held,
                on_host=EIGH_MATRICES * matrix if eigh_away else 0,
                flops={"eigh_host" if eigh_away else "eigh": 9.0 * d1**3},
            ),
        ]
    elif route == "randomized":
        passes = 1 + s.power_iterations
        phases.append(
            phase(
                "range",
                flight + frame_bytes(d1, d2, rows),
                keeps=False,
                flops=range_flops(d1, d2, own, rows, s.power_iterations),
                traffic=own * passes * (6.0 * d1 * d2 + 20.0 * d1 * rows),
                read_bytes=passes * own * layer,
            )
        )
    elif route == "exact":
        long, short = max(d1, own * d2), min(d1, own * d2)
        phases.append(
            phase(
                "svd",
                word * (2 * long * short + 3 * long * short),
                keeps=False,
                flops={"eigh": 6.0 * long * short**2 + 20.0 * short**3},
                read_bytes=own * layer,
            )
        )
    again = n - own if held else n  # layers that are read for the projection
    phases.append(
        phase(
            "project",
            needs.project + (flight if again else 0),
            flops=project_flops(route, d1, d2, n, rank, rows),
            traffic=8.0 * of_one + n * 6.0 * d1 * d2,
            moved=4 * of_one + (own * layer if held else 0),
            read_bytes=again * layer,
        )
    )
    if s.predictor == "ridge":
        phases.append(
            phase(
                "train",
                needs.train,
                flops=ridge_flops(d2, rank, n, trained),
                moved=ridge_moved,
            )
        )
    else:
        steps = s.epochs * math.ceil(samples / s.batch_size)
        train = phase(
            "train",
            needs.train,
            # Products of a stack are no longer narrow, and its parameters pass through memory in each step.
            flops={"narrow" if stack == 1 else "fp32": samples * s.epochs * s.hidden * (14.0 * d2 + 6 * s.hidden)},
            traffic=0.0 if stack == 1 else STEP_WORDS * word * weights * steps,
            moved=3.0 * s.epochs * samples * row,
        )
        phases.append(replace(train, steps=steps * task.fits // stack))
    one = 4 * rank * d2 * d2 if s.predictor == "ridge" else 2 * rank * weights  # a layer, predicted
    rival = needs.rival
    scored = min(trained, max(held_out, SCORED)) + held_out
    flops = {"fp32": float(scored * one)}
    if rival:
        flops["fp32"] += scored * 4.0 * rank * d2 * d2 + ridge_flops(d2, rank, n, trained)["fp32"]
    phases += [
        phase(
            "yardsticks",
            needs.yardsticks,
            flops=flops,
            traffic=40.0 * word * scored * rank * d2,
            moved=3.0 * scored * rank * row + (ridge_moved if rival else 0),
        ),
        phase(
            "predict",
            needs.predict,
            flops={"fp32": slots * (one + 2.0 * d1 * rank * d2)},
            # Composed, its norm taken, converted and looked at: mostly fresh memory.
            traffic=slots * (40.0 * d1 * d2 + 8.0 * word * rank * d2),
            moved=2.0 * slots * rank * row,
            write_bytes=slots * layer,
        ),
    ]
    return UnitCost(route, rank, place, size, layer, tuple(phases))


def require_device_memory(task: Task, name: str) -> None:
    """Raises: RoomError if the unit of weight type `name` needs more of the GPU than is its own."""
    cost = unit_cost(task)
    if cost.device_memory > task.device_memory:
        largest = max(cost.phases, key=lambda phase: phase.device)
        raise RoomError(
            f"{name} needs {size_text(cost.device_memory)} of a GPU, its share is {size_text(task.device_memory)}; "
            f"give it more of a GPU if there is more, --gpus-per-task 0, {_less(task, largest)}"
        )


def require_host_memory(task: Task, name: str) -> None:
    """Raises: RoomError if the unit of weight type `name` needs more host memory than its budget."""
    if task.memory_budget is not None:
        cost = unit_cost(task)
        largest = max(cost.phases, key=lambda phase: phase.host)
        require_budget(task.memory_budget, cost.host_memory, name, _less(task, largest))


def _less(task: Task, largest: Phase) -> str:
    """What takes less memory, for a message; largest: the phase that takes the most."""
    by_system = task.settings.predictor == "ridge" and largest.name == "train"
    return "or use --predictor mlp" if by_system else "or keep fewer directions (--rank)"


def stack_size(task: Task) -> int:
    """How many fits like `task` make a unit, by what was stated alone."""
    one = unit_cost(replace(task, fits=1))
    # Coefficients, frame, and the predictor with its copy, gradient and moments.
    kept = one.coefficient_bytes + word_of(task) * (task.d1 * one.rank + 5 * predictor_weights(task))
    return max(min(side_by_side(task.settings, "cuda", STACK), STACK_BYTES // kept), 1)
