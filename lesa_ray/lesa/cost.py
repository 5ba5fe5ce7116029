"""What LESA costs for one unit of work, from sizes alone: operations, bytes and peak memory, phase by phase.

The phases are those of `spectral`, `fit` and the writing of the result. What each does is counted and not measured, so
that `auto` chooses a spectral route, Ray is told how much memory a unit takes, and `inspect` predicts a run, all by one
model and before anything is read. How long a count takes on a machine is `rates`' part. Imports no torch.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lesa_ray.budget import require_budget
from lesa_ray.config import LesaSettings
from lesa_ray.errors import RoomError
from lesa_ray.gpu import DEVICE_SHARE
from lesa_ray.sizes import size as size_text

Route = Literal["gram", "randomized", "exact", "none"]
Place = Literal["device", "memory", "scratch"]
"""Where the coefficients lie: on the GPU, in host memory, in a file in node-local scratch."""

GRAM_ALWAYS = 2048
"""Up to this d1, eigh takes about two seconds on one core, and its exactness is worth more than a rank's saving."""
GRAM_MEMORY = 32 * 2**30
"""Bytes for which `auto` takes the Gram route without a budget, if there is a rank to avoid it by: d1 up to 32,768."""
EXACTNESS = 4
"""`auto` takes the randomised route to save time only for a rank below this part of all directions: its frame is
accurate where many directions are left out, and of few the Gram route finds the very ones."""
EIGH_MATRICES = 3
"""d1² doubles at the peak of eigh: the matrix, in which the eigenvectors come back, and a workspace of two."""
CUSOLVER_ROWS = 23_000
"""Rows that the eigensolver of every cuSOLVER takes; that of CUDA 13 takes more."""
SPLIT_MATRICES = 6
"""d1² doubles at the peak where a larger matrix is split (`split_eigh`), the matrix among them. Reckoned with whichever
CUDA there is, as estimates do not know it."""
SYEVD_ROWS = 32_766
"""Rows of the largest matrix that LAPACK's syevd takes: its 2·d1² words of workspace are counted in 32 bits. With more
PyTorch 2.13 dies of a segmentation fault (pytorch/pytorch, issue 92141)."""
GRAM_BLOCK = {"cpu": 256, "cuda": 2048}
"""Rows of G summed at once."""
RIDGE_FEATURES = {"cpu": 8192, "cuda": 32768}
"""2·d2 up to which ridge is fitted: the system takes 0.5 GB in float64 and 200 GFLOP to solve; on a GPU 8.6 GB, twice
while solving."""
RIDGE_BLOCK = 256
"""Rows at once where ridge's system is added up, factorised and solved, all in the system's own memory."""
SCORED = 4
"""Training triples that are scored where fewer are held out. Predicting one by ridge takes nearly as long as adding it
to the normal equations: with all of them the fit would take almost twice as long."""
STACKED_ON = ("cuda",)
"""Kinds of device on which predictors of one shape are trained side by side; on others one after another: on a CPU core
one step of many takes 1.0 to 1.4 times as long as a step of each (at d2 = 256 to 2,048, 4 to 16 of them; measured),
since a single predictor stays in the cache and its products are at the core's peak already."""
STACK = 16
"""Most fits that a unit of several does side by side: at 64 rows each their products then fill a GPU, and a mixture of
128 experts still makes 24 units to share among GPUs. Reckoned, not measured."""
STACK_BYTES = 8 * 2**30
"""And most that they keep: what is larger fills a GPU sooner by itself. Both are fixed and no GPU's own, so that the
units, and with them every byte of the result, are the same on all GPUs of a kind."""
EXACT = 4096
"""Rows up to which layers are matched by the exact assignment: two seconds, and costs of 134 MB in float64."""

STEP_WORDS = 10
"""Words of memory that pass for each weight in a step of a stack: one read or two by the products, the gradient
written, AdamW's four reads and three writes. A single predictor's stay in a processor's cache."""

_REFERENCE = {"half": 110e9, "fp32": 110e9, "fp64": 60e9, "eigh": 45e9}
"""Operations a second by which routes are compared: a CPU core's. Fixed, so that the choice, and with it every byte of
the result, is the same on every machine. A GPU is still slower in eigh, against its products."""


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
    if _layers_in_flight(d1, d2, element_bytes) + EIGH_MATRICES * 8 * d1 * d1 > (memory_budget or GRAM_MEMORY):
        return "randomized"
    if d1 <= GRAM_ALWAYS or rank * EXACTNESS > min(d1, layers * d2):
        return "gram"
    gram = _gram_flops(d1, d2, layers, element_bytes, "cpu"), _project_flops("gram", d1, d2, layers, rank, rows)
    other = (
        _range_flops(d1, d2, layers, rows, power_iterations),
        _project_flops("randomized", d1, d2, layers, rank, rows),
    )
    return "randomized" if _reference_seconds(*other) < _reference_seconds(*gram) else "gram"


def choose_place(size: int, beside: int, budget: int | None, fits_gpu: Callable[[int], bool] | None) -> Place:
    """Where coefficients of `size` bytes lie when `beside` more are needed where the unit computes.

    budget: bytes of host memory; None: no limit. fits_gpu: whether as many bytes fit on the GPU; None without one."""
    if fits_gpu is not None and fits_gpu(size + beside):
        return "device"
    needed = size + (beside if fits_gpu is None else 0)
    return "memory" if budget is None or needed <= budget else "scratch"


def eigh_bytes(d1: int, device: str) -> int:
    """Of a Gram matrix while its eigenvectors are found: the matrix, in which they come back, and a workspace."""
    return (SPLIT_MATRICES if device == "cuda" and d1 > CUSOLVER_ROWS else EIGH_MATRICES) * 8 * d1 * d1


def bytes_beside(task: Task) -> tuple[int, int]:
    """What is needed beside the coefficients where the unit computes, from when they take their place on, at the peak
    of each phase: if they take it before the Gram matrix is summed, and if after the basis was found."""
    needs = _needs(task, *_sizes(task))
    return needs.early, needs.late


def why_no_room_for_ridge(task: Task) -> str | None:
    """Why ridge is no yardstick for want of the GPU's memory, wherever the coefficients lie, or None."""
    if task.device == "cpu":
        return None
    needed, most = _needs(task, *_sizes(task)).ridge, int(DEVICE_SHARE * task.device_memory)
    return f"takes {size_text(needed)} of a GPU; there are {size_text(most)} for it" if needed > most else None


def require_device_memory(task: Task, name: str) -> None:
    """Raises: RoomError if the unit of weight type `name` needs more of the GPU than is its own."""
    needed = unit_cost(task).device_memory
    if needed > task.device_memory:
        raise RoomError(
            f"{name} needs {size_text(needed)} of a GPU, its share is {size_text(task.device_memory)}; give it a "
            "larger --gpus-per-task, --gpus-per-task 0, or keep fewer directions (--rank)"
        )


def require_host_memory(task: Task, name: str) -> None:
    """Raises: RoomError if the unit of weight type `name` needs more host memory than its budget."""
    if task.memory_budget is not None:
        needed = unit_cost(task).host_memory
        require_budget(task.memory_budget, needed, name, "or keep fewer directions (--rank)")


def side_by_side(settings: LesaSettings, device: str, fits: int) -> int:
    """How many of a unit's fits are done at once on a kind of device."""
    return fits if settings.predictor == "mlp" and device in STACKED_ON else 1


def stack_size(task: Task) -> int:
    """How many fits like `task` make a unit, by what was stated alone."""
    one = unit_cost(replace(task, fits=1))
    # Coefficients, frame, and the predictor with its copy, gradient and moments.
    kept = one.coefficient_bytes + _word(task) * (task.d1 * one.rank + 5 * _weights(task))
    return max(min(side_by_side(task.settings, "cuda", STACK), STACK_BYTES // kept), 1)


def unit_cost(task: Task) -> UnitCost:
    """Work and memory of one unit."""
    s, d1, d2 = task.settings, task.d1, task.d2
    n, own = task.checkpoints * task.layers, task.basis * task.layers
    stack, slots = side_by_side(s, task.device, task.fits), task.slots // task.fits
    route, rank, rows = _sizes(task)
    needs = _needs(task, route, rank, rows)
    word = _word(task)
    row = word * d2
    layer, of_one = d1 * d2 * task.element_bytes, n * rows * d2 * word
    size = stack * of_one
    weights = _weights(task)

    # As Room decides: where the layers of the first pass can wait in the coefficients' place, they are read once.
    early = _place(task, size, needs.early)
    held = route == "gram" and early != "scratch" and rows * word >= d1 * task.element_bytes
    place = early if held else _place(task, size, needs.late)
    flight = _layers_in_flight(d1, d2, task.element_bytes)
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

    trained, held_out = _triples(task)
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
                flops=_gram_flops(d1, d2, own, task.element_bytes, task.device),
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
                flight + _frame_bytes(d1, d2, rows),
                keeps=False,
                flops=_range_flops(d1, d2, own, rows, s.power_iterations),
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
            flops=_project_flops(route, d1, d2, n, rank, rows),
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
                flops=_ridge_flops(d2, rank, n, trained),
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
        flops["fp32"] += scored * 4.0 * rank * d2 * d2 + _ridge_flops(d2, rank, n, trained)["fp32"]
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


@dataclass(frozen=True)
class _Needs:
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


def _needs(task: Task, route: Route, rank: int, rows: int) -> _Needs:
    s, d1, d2, word, weights = task.settings, task.d1, task.d2, _word(task), _weights(task)
    stack = side_by_side(s, task.device, task.fits)
    frame = 0 if route == "none" else word * d1 * rows
    others = (stack - 1) * (frame + word * weights)
    flight = _layers_in_flight(d1, d2, task.element_bytes)
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
        samples = _triples(task)[0] * rank
        batch = 8 * word * s.batch_size * (3 * d2 + s.hidden)
        train = frame + stack * (4 * word * weights + 64 * samples + batch)
    yardsticks = ridge if rival else frame + scores + (solution if by_ridge else 0)
    predict = frame + word * (6 * rank * d2 + 3 * d1 * d2) + (solution if by_ridge else 0)

    later = max(train, yardsticks, predict)
    again = flight if task.checkpoints > task.basis else 0
    early = others + max(gram, eigh, project + again, later)
    late = others + max(project + flight, later)
    return _Needs(others, gram, eigh, project, train, ridge + others, yardsticks, predict, rival, early, late)


def _sizes(task: Task) -> tuple[Route, int, int]:
    """The route, the directions that are kept, and those that are held until they are turned."""
    s, own, route = task.settings, task.basis * task.layers, route_of(task)
    directions = task.d1 if route == "none" else min(task.d1, own * task.d2)
    rank = min(s.rank or directions, directions)
    return route, rank, min(rank + s.oversampling, directions) if route == "randomized" else rank


def held_out_triples(triples: int, holdout: float) -> int:
    """How many of them are kept from training: at least one if `holdout` is above 0, never all."""
    return min(max(round(holdout * triples), 1), triples - 1) if holdout > 0 else 0


def _triples(task: Task) -> tuple[int, int]:
    """How many are trained on, and how many held out."""
    triples = task.checkpoints * (task.layers - 2)
    held_out = held_out_triples(triples, task.settings.holdout)
    return triples - held_out, held_out


def _word(task: Task) -> int:
    """Bytes of a coefficient: float32, or float64 where the weights are."""
    return 8 if task.element_bytes == 8 else 4


def _weights(task: Task) -> int:
    """Of a predictor; its few biases left out."""
    return task.settings.hidden * (3 * task.d2 + task.settings.hidden)


def _place(task: Task, size: int, beside: int) -> Place:
    def fits(nbytes: int) -> bool:
        return nbytes <= DEVICE_SHARE * task.device_memory

    return choose_place(size, beside, task.memory_budget, fits if task.device == "cuda" else None)


def _layers_in_flight(d1: int, d2: int, element_bytes: int) -> int:
    """Bytes of the layer in use, the next, the one the reader holds, and the copy that is multiplied."""
    return d1 * d2 * (3 * element_bytes + (4 if element_bytes == 2 else 8))


def _frame_bytes(d1: int, d2: int, rows: int) -> int:
    """The randomised range finder: the sample, QR's copies and its answer in float64, the frame and Ω in float32."""
    return rows * (28 * d1 + 4 * d2)


def _gram_flops(d1: int, d2: int, layers: int, element_bytes: int, device: str) -> dict[str, float]:
    block = GRAM_BLOCK[device]
    whole, rest = divmod(d1, block)
    products = block * block * whole * (whole + 1) + 2 * rest * d1
    return {"half" if element_bytes == 2 else "fp64": float(products) * d2 * layers}


def _range_flops(d1: int, d2: int, layers: int, rows: int, iterations: int) -> dict[str, float]:
    """Householder QR with its Q: 4·d1·rows² − 4/3·rows³ (Golub, Van Loan, section 5.2)."""
    qr = 4.0 * d1 * rows**2 - 4 / 3 * rows**3
    return {"fp32": (2.0 + 4 * iterations) * layers * d1 * d2 * rows, "fp64": (1 + iterations) * qr}


def _project_flops(route: str, d1: int, d2: int, layers: int, rank: int, rows: int) -> dict[str, float]:
    if route == "none":
        return {}
    flops = {"fp32": 2.0 * layers * d1 * d2 * rows}
    if route == "randomized":
        flops["fp32"] += 2.0 * layers * rank * rows * d2
        flops["fp64"] = _gram_flops(rows, d2, layers, 4, "cpu")["fp64"] + 2.0 * d1 * rows * rank
        flops["eigh"] = 9.0 * rows**3
    return flops


def _ridge_flops(d2: int, rank: int, layers: int, trained: int) -> dict[str, float]:
    """Products of layers with themselves (the lower half), of those two apart and one apart; Cholesky and its solve."""
    near = min(layers, 2 * trained)
    products = near * rank * d2 * (d2 + 256.0) + (trained + near) * 2.0 * rank * d2 * d2
    return {"fp32": products + (2.0 * d2) ** 3 / 3 + 8.0 * d2**3}


def _reference_seconds(*flops: Mapping[str, float]) -> float:
    return sum(count / _REFERENCE[kind] for one in flops for kind, count in one.items())
