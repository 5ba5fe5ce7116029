"""LESA for one weight type, from its layers to the weights of its new layers (arXiv 2502.13794, section 3).

1. spectral: basis U Σ common to all layers, coefficients V_i of each;
2. triples (V_{i−1}, V_i, V_{i+1}), a seeded share of them held out;
3. G is trained on the rest;
4. it is scored beside its yardsticks, on the triples it saw and on those it did not;
5. slots: a new layer between two layers gets W = U Σ G([V_lower, V_upper]).

Fine-tunes of the base, of the same shape, may add triples, taken in the base's basis, as the paper's do. Cost at
d1 = d2 = d and L layers: about 3·L·d³ + 10·d³ operations for the basis, 14·d·hidden per row and epoch for G, 6·L·d³ for
ridge, and one copy of the layers in float32, in memory or in a scratch file. Knows no files, tensor names or Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lesa_ray.config import LesaSettings
from lesa_ray.errors import UserError
from lesa_ray.lesa import yardsticks
from lesa_ray.lesa.predictor import Predictor, Progress, train
from lesa_ray.lesa.report import FitReport, Predict, Score, score
from lesa_ray.lesa.spectral import Decomposition, decompose
from lesa_ray.lesa.streams import Load, generator_for


def fit_weight_type(
    load: Load,
    layers: int,
    slots: Sequence[tuple[int, int, int]],
    store: Callable[[int, Tensor], None],
    settings: LesaSettings,
    seed: int,
    *,
    device: str = "cpu",
    variants: Sequence[Load] = (),
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Fit one weight type and hand the weight of each slot, (d1, d2) float32 on the CPU, to `store`, one at a time.

    A slot is (id, lower, upper). Layers 0 … L−1 are the base's; new ones count on from L in the order they are made,
    and a neighbour may be a new one that comes earlier: its predicted coefficients are then used.

    `load(i)` gives layer i of the base, each of `variants` the same of another checkpoint; layers are loaded
    two or more times. Coefficients above `memory_budget` bytes go
    to a vanishing file in `scratch_dir`. The same arguments give the same bytes on the same kind of device
    with the same number of threads.

    Raises: UserError for fewer than 3 layers, and for layers that are not finite float matrices of one shape.
    """
    if layers < 3:
        raise UserError(f"LESA learns from three layers in a row; the base has {layers}")
    clock = _Clock()
    report = progress or (lambda phase, share: None)
    report("decomposing", 0.0)
    with torch.no_grad():
        with clock.phase("spectral"):
            parts = decompose(
                [clock.timed("load", source) for source in (load, *variants)],
                layers,
                svd=settings.svd,
                rank=settings.rank,
                oversampling=settings.oversampling,
                power_iterations=settings.power_iterations,
                seed=seed,
                device=device,
                scratch_dir=scratch_dir,
                memory_budget=memory_budget,
            )
        coefficients = _on_device(parts.coefficients.flatten(0, 1), device)  # (checkpoints · L, r, d2)
        _, r, d2 = coefficients.shape

        training, held_out = split_triples(1 + len(variants), layers, settings.holdout, seed)

        with clock.phase("train"):
            predictor = Predictor(d2, settings.hidden, coefficients.dtype, device, seed)
            losses = train(predictor, coefficients, training, settings, seed, _between(report, 0.1, 0.9))

        with clock.phase("yardsticks"):
            skipped = yardsticks.why_no_ridge(d2, device)
            rivals: dict[str, Predict] = {
                "predictor": predictor,
                "zero": yardsticks.zero,
                "mean": yardsticks.mean,
            }
            if skipped is None:
                rivals["ridge"] = yardsticks.fit_ridge(coefficients, training, device)

            def scores(middles: list[int]) -> dict[str, Score]:
                return score(rivals, parts, coefficients, middles, settings.norm_weight, settings.batch_size, device)

            on_training, on_held_out = scores(training), scores(held_out) if held_out else None

        with clock.phase("predict"):
            ratio = _fill(slots, layers, predictor, parts, coefficients, store, _between(report, 0.9, 1.0))

    return FitReport(
        d1=parts.shape[0],
        d2=d2,
        layers=layers,
        checkpoints=1 + len(variants),
        rank=r,
        route=parts.route,
        captured=parts.captured,
        sigma_max=float(parts.sigma.max()),
        sigma_min=float(parts.sigma.min()),
        triples_trained=len(training),
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


def split_triples(checkpoints: int, layers: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Middle layers of the training and of the held-out triples, as indices into (checkpoints · layers), ascending.

    At least one triple is held out if `holdout` is above 0, and at least one is trained on; a single triple
    is trained on.
    """
    middles = torch.tensor([c * layers + i for c in range(checkpoints) for i in range(1, layers - 1)])
    count = min(max(round(holdout * len(middles)), 1), len(middles) - 1) if holdout > 0 else 0
    order = torch.randperm(len(middles), generator=generator_for(seed, "holdout"))
    chosen: list[int] = middles[order].tolist()
    return sorted(chosen[count:]), sorted(chosen[:count])


def _fill(
    slots: Sequence[tuple[int, int, int]],
    layers: int,
    predictor: Predictor,
    parts: Decomposition,
    coefficients: Tensor,
    store: Callable[[int, Tensor], None],
    progress: Progress,
) -> float | None:
    """Predict and store each slot; return the mean ratio of its norm to its neighbours'.

    Coefficients of a new layer are kept only until the last slot that refers to it.
    """
    last_use = {neighbour: at for at, slot in enumerate(slots) for neighbour in slot[1:]}
    made: dict[int, Tensor] = {}
    norms = dict(enumerate(parts.squares[0].sqrt().tolist()))
    ratios: list[float] = []

    def of(layer: int) -> Tensor:
        return coefficients[layer] if layer < layers else made[layer]

    for at, (slot, lower, upper) in enumerate(slots):
        predicted = predictor(of(lower), of(upper))
        weight = parts.compose(predicted)
        norms[slot] = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        if not math.isfinite(norms[slot]):
            raise UserError(
                f"new layer {slot} between {lower} and {upper}: the prediction is not finite; lower learning_rate"
            )
        neighbours = (norms[lower] + norms[upper]) / 2
        if neighbours > 0:
            ratios.append(norms[slot] / neighbours)
        store(slot, weight.float().cpu())
        made[slot] = predicted
        made = {layer: kept for layer, kept in made.items() if last_use.get(layer, -1) > at}
        progress("predicting new layers", (at + 1) / len(slots))
    return sum(ratios) / len(ratios) if ratios else None


def _between(progress: Progress, start: float, end: float) -> Progress:
    """Progress of one step, which takes the unit from share `start` to share `end`."""
    return lambda phase, share: progress(phase, start + share * (end - start))


def _on_device(coefficients: Tensor, device: str) -> Tensor:
    """The coefficients on a GPU if they take at most three quarters of its free memory, else where they are.

    Where they lie decides the speed of a gather, not a single bit of the result.
    """
    if torch.device(device).type != "cuda":
        return coefficients
    torch.cuda.empty_cache()  # eigh's workspace, otherwise still counted as taken
    free, _ = torch.cuda.mem_get_info(device)
    return coefficients.to(device) if coefficients.nbytes <= 0.75 * free else coefficients


class _Clock:
    """Seconds by phase; time spent in `load` is counted there and not in the phase around it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "spectral", "train", "yardsticks", "predict"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, loaded = time.perf_counter(), self.seconds["load"]
        yield
        self.seconds[name] += time.perf_counter() - start - (self.seconds["load"] - loaded)

    def timed(self, name: str, load: Load) -> Load:
        def timed_load(layer: int) -> Tensor:
            start = time.perf_counter()
            weight = load(layer)
            self.seconds[name] += time.perf_counter() - start
            return weight

        return timed_load
