"""LESA for a weight type, from its layers to the weights of its new layers (arXiv 2502.13794, section 3).

1. spectral: basis U Σ common to all layers, coefficients V_i of each;
2. triples (V_{i−1}, V_i, V_{i+1}), a seeded share of them held out;
3. G is trained on the rest, or solved for in closed form (predictor `ridge`);
4. it is scored beside its yardsticks, on some of the triples it saw and on those it did not;
5. slots: a new layer between two layers gets W = U Σ G([V_lower, V_upper]).

Fine-tunes of the base, of the same shape, may add triples, taken in the base's basis, as the paper's do. Cost at
d1 = d2 = d and L layers: about 3·L·d³ + 10·d³ operations for the basis, 14·d·hidden per row and epoch for G, 5·L·d³ for
ridge, and one copy of the layers in float32, in memory or in a scratch file. Knows no files, tensor names or Ray.

What has a basis and a predictor of its own is a `Fit`: a weight type, an expert of it, or all experts that share them.
Fits of one shape are trained side by side where that pays (`bounds.STACKED_ON`).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lesa_ray.config import LesaSettings, NormRule
from lesa_ray.errors import UserError
from lesa_ray.gpu import allowed_memory
from lesa_ray.lesa import yardsticks
from lesa_ray.lesa.bounds import SCORED
from lesa_ray.lesa.clock import Clock
from lesa_ray.lesa.needs import why_no_room_for_ridge
from lesa_ray.lesa.predictor import Predictor, Progress, train_together
from lesa_ray.lesa.report import FitReport, Predict, score
from lesa_ray.lesa.ridge import fit_ridge, why_no_ridge
from lesa_ray.lesa.room import Rooms
from lesa_ray.lesa.spectral import Decomposition, decompose
from lesa_ray.lesa.streams import Load, generator_for, row_blocks, square_norm
from lesa_ray.lesa.task import Task, held_out_triples, side_by_side


@dataclass(frozen=True)
class Fit:
    """What gets a basis and a predictor of its own: one matrix of each layer, or several, its members."""

    loads: Sequence[Load]
    """`loads[e](i)` gives member e of layer i of the base."""
    store: Callable[[int, int, Tensor], None]
    """Takes member e of a new layer, (d1, d2) float32 on the CPU, as (e, slot, weight): one at a time, slot by slot."""
    seed: int
    variants: Sequence[Load] = ()
    """The same as `loads` of other checkpoints, all members of one after those of another."""


def fit_weight_type(
    load: Load,
    layers: int,
    slots: Sequence[tuple[int, int, int]],
    store: Callable[[int, Tensor], None],
    settings: LesaSettings,
    seed: int,
    *,
    device: str = "cpu",
    device_memory: int = 0,
    variants: Sequence[Load] = (),
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Fit one weight type: `fit_each` for a single matrix of each layer."""
    (report,) = fit_each(
        [Fit([load], lambda member, slot, weight: store(slot, weight), seed, variants)],
        layers,
        slots,
        settings,
        device=device,
        device_memory=device_memory,
        scratch_dir=scratch_dir,
        memory_budget=memory_budget,
        progress=progress,
    )
    return report


def fit_each(
    fits: Sequence[Fit],
    layers: int,
    slots: Sequence[tuple[int, int, int]],
    settings: LesaSettings,
    *,
    device: str = "cpu",
    device_memory: int = 0,
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> list[FitReport]:
    """Fit matrices of one shape, and store the new layers' weights, those of one fit after those of another.

    A slot is (id, lower, upper). Layers 0 … L−1 are the base's; new ones count on from L in the order they are made,
    and a neighbour may be a new one that comes earlier: its predicted coefficients are then used. Member e of a new
    layer is predicted from member e of its neighbours.

    Layers are loaded once or more, in a thread. Coefficients above `memory_budget` bytes go to a vanishing file in
    `scratch_dir`. device_memory: bytes of the GPU that are the fits' own, by which a yardstick without room is left
    out; 0: what this process may take. On GPUs the predictors of several fits are trained side by side, and all their
    coefficients are held meanwhile; on CPUs one fit is done after another, with the bytes that each would have alone.
    The same arguments give the same bytes on the same kind of device with the same number of threads.

    Raises: UserError for fewer than 3 layers, and for layers that are not finite float matrices of one shape.
    """
    if layers < 3:
        raise UserError(f"LESA learns from three layers in a row; the base has {layers}")
    kind: Literal["cpu", "cuda"] = "cuda" if torch.device(device).type == "cuda" else "cpu"
    if kind == "cuda" and not device_memory:
        device_memory = allowed_memory(device)
    at_once = side_by_side(settings, kind, len(fits))
    reports: list[FitReport] = []
    for start in range(0, len(fits), at_once):
        some = fits[start : start + at_once]
        share = _between(progress or (lambda phase, share: None), start / len(fits), (start + len(some)) / len(fits))
        with torch.no_grad():
            task = Task(
                d1=0,  # what the layers have
                d2=0,
                layers=layers,
                slots=len(some) * len(slots),
                settings=settings,
                checkpoints=len(some[0].loads) + len(some[0].variants),
                basis=len(some[0].loads),
                fits=len(some),
                device=kind,
                memory_budget=memory_budget,
                device_memory=device_memory,
            )
            reports += _fit_at_once(some, task, slots, device, scratch_dir, share)
    return reports


def _fit_at_once(
    fits: Sequence[Fit],
    task: Task,
    slots: Sequence[tuple[int, int, int]],
    device: str,
    scratch_dir: str | None,
    progress: Progress,
) -> list[FitReport]:
    """task: the fits as a unit, but for the shape and element type of their matrices."""
    layers, settings, memory_budget = task.layers, task.settings, task.memory_budget
    progress("decomposing", 0.0)
    rooms = Rooms(len(fits), device, scratch_dir, memory_budget)
    clocks = [Clock(device) for _ in fits]
    bases = [
        decompose(
            [*fit.loads, *fit.variants],
            layers,
            basis=len(fit.loads),
            svd=settings.svd,
            rank=settings.rank,
            oversampling=settings.oversampling,
            power_iterations=settings.power_iterations,
            weigh=settings.weigh,
            scale=settings.scale,
            seed=fit.seed,
            device=device,
            scratch_dir=scratch_dir,
            memory_budget=memory_budget,
            rooms=rooms,
            task=task,
            clock=clock,
        )
        for fit, clock in zip(fits, clocks, strict=True)
    ]
    copies = task.checkpoints // task.basis
    splits = [split_triples(task.basis, layers, settings.holdout, fit.seed, copies) for fit in fits]

    training_clock = Clock(device)
    with training_clock.phase("train"):
        fitted = _fit_predictors(
            [parts.coefficients.flatten(0, 1) for parts in bases],
            [training for training, _ in splits],
            settings,
            [fit.seed for fit in fits],
            device,
            _between(progress, 0.1, 0.9),
        )

    reports = []
    for at, (fit, clock, parts) in enumerate(zip(fits, clocks, bases, strict=True)):
        clock.seconds["train"] = training_clock.seconds["train"] / len(fits)
        coefficients = parts.coefficients.flatten(0, 1)  # (checkpoints · members · L, r, d2)
        _, r, d2 = coefficients.shape
        (training, held_out), (predictor, losses) = splits[at], fitted[at]

        with clock.phase("yardsticks"):
            rivals: dict[str, Predict] = {"predictor": predictor, "zero": yardsticks.zero, "mean": yardsticks.mean}
            skipped = _why_no_yardstick(
                replace(task, d1=parts.shape[0], d2=d2, element_bytes=coefficients.element_size()), device
            )
            if skipped is None:
                rivals["ridge"] = fit_ridge(coefficients, training, settings.ridge, device)
            scored = evenly(training, max(len(held_out), SCORED))
            measure = functools.partial(
                score,
                rivals,
                parts,
                coefficients,
                norm_weight=settings.norm_weight,
                batch_size=settings.batch_size,
                device=device,
            )
            on_training, on_held_out = measure(middles=scored), measure(middles=held_out) if held_out else None
            del rivals, measure  # ridge's solution, 8·d2² bytes, is not needed to predict

        with clock.phase("predict"):
            filling = _between(progress, 0.9 + 0.1 * at / len(fits), 0.9 + 0.1 * (at + 1) / len(fits))
            ratio = _fill(slots, len(fit.loads), predictor, parts, fit.store, settings.norms, filling)

        reports.append(
            FitReport(
                d1=parts.shape[0],
                d2=d2,
                layers=layers,
                checkpoints=1 + len(fit.variants) // len(fit.loads),
                members=len(fit.loads),
                predictor=settings.predictor,
                rank=r,
                route=parts.route,
                captured=parts.captured,
                sigma_max=float(parts.sigma.max()),
                sigma_min=float(parts.sigma.min()),
                triples_trained=len(training),
                triples_scored=len(scored),
                triples_held_out=len(held_out),
                rows_trained=len(training) * r,
                rows_held_out=len(held_out) * r,
                train_loss=tuple(losses),
                trained=on_training,
                held_out=on_held_out,
                ridge_skipped=skipped,
                norm_ratio=ratio,
                seconds=clock.seconds,
            )
        )
    return reports


def split_triples(members: int, layers: int, holdout: float, seed: int, copies: int = 1) -> tuple[list[int], list[int]]:
    """Middle layers of the training and of the held-out triples: indices into (copies · members · layers), ascending.

    copies: the base and its variants. What is held out of one is held out of all: a variant's layer is the base's but
    for a little, so that who has learnt it knows the other.
    At least one triple of the base is held out if `holdout` is above 0, and at least one is trained on; a single
    triple is trained on.
    """
    middles = torch.tensor([m * layers + i for m in range(members) for i in range(1, layers - 1)])
    count = held_out_triples(len(middles), holdout)
    order = torch.randperm(len(middles), generator=generator_for(seed, "holdout"))

    def of_all_copies(chosen: Tensor) -> list[int]:
        return sorted(copy * members * layers + at for copy in range(copies) for at in chosen.tolist())

    return of_all_copies(middles[order[count:]]), of_all_copies(middles[order[:count]])


def evenly(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of them (two or more), spread from the first to the last."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[round(at * (len(numbers) - 1) / (count - 1))] for at in range(count)]


def _fit_predictors(
    coefficients: Sequence[Tensor],
    training: Sequence[Sequence[int]],
    settings: LesaSettings,
    seeds: Sequence[int],
    device: str,
    progress: Progress,
) -> list[tuple[Predict, list[float]]]:
    """For each fit what makes the new layers, and the loss of each epoch where it is trained by epochs."""
    if settings.predictor == "ridge":
        progress("solving for the predictor", 0.0)
        return [(fit_ridge(*fit, settings.ridge, device), []) for fit in zip(coefficients, training, strict=True)]
    d2 = coefficients[0].shape[2]
    networks = [Predictor(d2, settings.hidden, coefficients[0].dtype, device, seed) for seed in seeds]
    losses: dict[int, list[float]] = {}
    for together in _of_one_rank(coefficients):
        found = train_together(
            [networks[at] for at in together],
            [coefficients[at] for at in together],
            [training[at] for at in together],
            settings,
            [seeds[at] for at in together],
            _between(progress, len(losses) / len(networks), (len(losses) + len(together)) / len(networks)),
        )
        losses.update(zip(together, found, strict=True))
    return [(network, losses[at]) for at, network in enumerate(networks)]


def _of_one_rank(coefficients: Sequence[Tensor]) -> list[list[int]]:
    """Which of the fits have as many directions, so that their steps are of one shape; all, but for degenerate ones."""
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for at, one in enumerate(coefficients):
        groups[one.shape[1]].append(at)
    return list(groups.values())


def _why_no_yardstick(task: Task, device: str) -> str | None:
    """Why ridge is no yardstick of this fit, or None."""
    if task.settings.predictor == "ridge":
        return "it is the predictor"
    if not task.settings.ridge_yardstick:
        return "not wanted"
    return why_no_ridge(task.d2, device) or why_no_room_for_ridge(task)


def _fill(
    slots: Sequence[tuple[int, int, int]],
    members: int,
    predictor: Predict,
    parts: Decomposition,
    store: Callable[[int, int, Tensor], None],
    norm_rule: NormRule,
    progress: Progress,
) -> float | None:
    """Predict and store each slot; return the mean ratio of its norm, as predicted, to its neighbours'.

    Coefficients of a new layer are kept only until the last slot that refers to it.
    """
    layers = parts.coefficients.shape[1]
    last_use = {neighbour: at for at, slot in enumerate(slots) for neighbour in slot[1:]}
    made: dict[tuple[int, int], Tensor] = {}
    norms = {(e, i): math.sqrt(parts.squares[e, i]) for e in range(members) for i in range(layers)}
    ratios: list[float] = []

    def of(member: int, layer: int) -> Tensor:
        return parts.coefficients[member, layer] if layer < layers else made[member, layer]

    stored: Future[None] | None = None
    with ThreadPoolExecutor(1, "store") as behind:  # a weight is written while the next one is predicted
        for at, (slot, lower, upper) in enumerate(slots):
            for member in range(members):
                below, above = of(member, lower), of(member, upper)
                predicted = torch.cat([predictor(below[rows], above[rows]) for rows in row_blocks(len(below))])
                weight = parts.compose(predicted)
                norm = math.sqrt(square_norm(weight))
                if not math.isfinite(norm):
                    raise UserError(
                        f"new layer {slot} between {lower} and {upper}: the prediction is not finite; "
                        "lower learning_rate"
                    )
                neighbours = (norms[member, lower] + norms[member, upper]) / 2
                if neighbours > 0:
                    ratios.append(norm / neighbours)
                if norm_rule == "neighbours" and norm > 0:
                    weight, predicted, norm = weight * (neighbours / norm), predicted * (neighbours / norm), neighbours
                if stored is not None:
                    stored.result()
                stored = behind.submit(store, member, slot, weight.float().cpu())
                norms[member, slot] = norm
                if last_use.get(slot, -1) > at:
                    made[member, slot] = predicted
            made = {key: kept for key, kept in made.items() if last_use[key[1]] > at}
            progress("predicting new layers", (at + 1) / len(slots))
        if stored is not None:
            stored.result()
    return sum(ratios) / len(ratios) if ratios else None


def _between(progress: Progress, start: float, end: float) -> Progress:
    """Progress of one step, which takes the unit from share `start` to share `end`."""
    return lambda phase, share: progress(phase, start + share * (end - start))
