"""Step 1 of LESA: the basis U Σ that all layers of a weight type share, and each layer's coefficients V_i.

Put side by side, the L matrices W_i (d1, d2) of one weight type are W = [W_1 … W_L] = U Σ [V_1 … V_L] (arXiv
2502.13794, section 3). W is never built but in the route `exact`; the others stream the layers:

exact       torch.linalg.svd of W. The reference, for tests and small models; slower, all layers in memory.
gram        G = Σ W_i W_iᵀ = U Σ² Uᵀ, eigh in float64. Two passes over the layers; they are read once, and wait in the
            place of their coefficients, if that is in memory. d1² · 8 bytes for G, three times that in eigh. With U
            orthonormal, U Uᵀ W_i = W_i whatever the error of Σ, so the full-rank reconstruction is as exact as U.
randomized  A random range finder with power iterations and a small Gram matrix on it (Halko, Martinsson,
            Tropp 2011, algorithms 4.4 and 5.1). 2 + power_iterations passes, (d1 + d2) · rank memory.
            Approximate: `captured` says how much of the energy ‖W‖² it found.
none        Identity basis, the weights are their own coefficients: the paper's ablation without SVD.

Squaring the matrix costs half the digits: in float64 a singular value of the Gram matrix is good to 1e-8 of
the largest, which is below what float32 weights hold. Singular values are then measured again as the norms of
the rows of UᵀW (a Rayleigh quotient, whose error is quadratic in that of U), and directions at rounding level
are dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lesa_ray.config import Scaling, SvdRoute, Weighing
from lesa_ray.errors import UserError
from lesa_ray.gpu import fits_device
from lesa_ray.lesa.bounds import EIGH_MATRICES, GRAM_BLOCK
from lesa_ray.lesa.clock import Clock
from lesa_ray.lesa.eigen import eigenvectors
from lesa_ray.lesa.needs import bytes_beside, eigh_bytes
from lesa_ray.lesa.room import Room, Rooms
from lesa_ray.lesa.route import choose_route
from lesa_ray.lesa.streams import Layers, Load, generator_for, working_dtype
from lesa_ray.lesa.task import Task


@dataclass(frozen=True)
class Decomposition:
    """Basis and coefficients of one weight type, in float32 (float64 if the weights are)."""

    route: SvdRoute
    left: Tensor | None
    """U: (d1, r), orthonormal columns, on the compute device; None is the identity (route `none`)."""
    sigma: Tensor
    """Σ: (r,) float64 on the CPU, descending but for rounding; ones in route `none`."""
    coefficients: Tensor
    """V: (checkpoints, L, r, d2), the base first; on the compute device, in host memory or in a mapped file."""
    squares: Tensor
    """‖W_i‖²_F: (checkpoints, L) float64."""
    basis: range
    """The checkpoints that the basis is of."""
    multipliers: Tensor
    """(r,) float64 on the CPU: what a row of V is multiplied by, so that W = U diag(multipliers) V. Σ as published;
    other choices rescale V (`weigh`, `scale`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d1, d2) of the weights."""
        rows = self.coefficients.shape[2] if self.left is None else self.left.shape[0]
        return rows, self.coefficients.shape[3]

    @property
    def captured(self) -> float:
        """Share of the energy ‖W‖²_F that lies in the basis; 1 − captured is the squared relative error."""
        if self.left is None:
            return 1.0
        total = float(self.squares[list(self.basis)].sum())
        return min(float(self.sigma.square().sum()) / total, 1.0) if total > 0 else 1.0

    def compose(self, coefficients: Tensor) -> Tensor:
        """W = U Σ V: coefficients (r, d2) to a weight (d1, d2) on the same device."""
        scaled = coefficients * self.multipliers.to(coefficients).unsqueeze(1)
        return scaled if self.left is None else self.left.to(coefficients.device) @ scaled

    def project(self, weight: Tensor) -> Tensor:
        """Coefficients (r, d2), on the compute device, of a weight (d1, d2) that the basis need not be of: what
        `compose` makes of them is the part of it that lies in the basis."""
        device = self.coefficients.device if self.left is None else self.left.device
        weight = weight.to(device, self.coefficients.dtype)
        rows = weight if self.left is None else self.left.T @ weight
        divisor = self.multipliers.clamp_min(torch.finfo(rows.dtype).tiny).to(rows)
        return rows / divisor.unsqueeze(1)


def decompose(
    loads: Sequence[Load],
    layers: int,
    *,
    basis: int = 1,
    svd: SvdRoute = "auto",
    rank: int | None = None,
    oversampling: int = 10,
    power_iterations: int = 2,
    weigh: Weighing = "direction",
    scale: Scaling = "none",
    seed: int = 0,
    device: str = "cpu",
    scratch_dir: str | None = None,
    memory_budget: int | None = None,
    rooms: Rooms | None = None,
    task: Task | None = None,
    clock: Clock | None = None,
) -> Decomposition:
    """Basis of the first `basis` checkpoints of `loads`, and in it the coefficients of all of them.

    weigh: `direction` gives V, whose rows are equally long; `energy` gives ΣV, of which rows count by their part in W.
    scale: `unit` makes the mean square of the base's coefficients 1 by one factor.
    memory_budget: bytes of host memory in all; without room for them in it, the coefficients lie in `scratch_dir`.
    rooms: where they lie beside those of other fits of one shape; by default by themselves.
    task: the unit that the coefficients are for, for what else has to fit beside them; its shape, element type and
    route are those found here. None: nothing else.
    clock: is charged with the phases load, gram, eigh, range, svd and project.
    Raises: UserError for weights that are not finite float matrices of one shape.
    """
    clock = clock or Clock(device)
    source = Layers(loads, layers, device, clock)
    d1, d2 = source.shape
    dtype = working_dtype(source.dtype)
    route = svd
    if svd == "auto":
        route = choose_route(
            d1,
            d2,
            basis * layers,
            rank,
            element_bytes=source.dtype.itemsize,
            oversampling=oversampling,
            power_iterations=power_iterations,
            memory_budget=memory_budget,
        )
    if route == "none" and rank is not None:
        raise UserError(f"rank {rank} with svd none: without a decomposition there are no directions to choose from")
    directions = min(d1, basis * source.columns)
    keep = d1 if route == "none" else min(rank or d1, directions)
    rows = min(keep + oversampling, directions) if route == "randomized" else keep
    rooms = rooms or Rooms(1, device, scratch_dir, memory_budget)
    room = rooms.next((len(loads), layers, rows, d2), dtype)
    own = range(basis)
    early, late = eigh_bytes(d1, torch.device(device).type), 0 if route == "none" else rows * d1 * dtype.itemsize
    if task is not None:
        found = task.settings.model_copy(update={"svd": route})
        early, late = bytes_beside(replace(task, d1=d1, d2=d2, element_bytes=source.dtype.itemsize, settings=found))

    held = False
    frame: Tensor | None = None  # (d1, rows), orthonormal columns
    if route == "gram":
        # Each layer is read once: until it is projected it lies where its coefficients will.
        held = room.holds(d1 * d2 * source.dtype.itemsize) and room.take(early, or_file=False)
    if not held:
        room.reserve(late)
    if route == "gram":
        with clock.phase("gram"):
            gram = _gram(source, own, device, room if held else None)
        with clock.phase("eigh"):
            frame = _leading(gram, keep, dtype).to(device)
            del gram
    elif route == "exact":
        with clock.phase("svd"):
            frame = _fix_signs(_exact(source, own)[:, :keep].contiguous())
    elif route == "randomized":
        with clock.phase("range"):
            frame = _range(source, own, rows, power_iterations, seed).to(dtype)

    with clock.phase("project"):
        room.take(late, taken=0 if frame is None else frame.nbytes, or_file=True)
        coefficients = room.tensor
        if held:
            for c, i in itertools.product(own, range(layers)):
                weight = room.layer(c, i, source.shape, source.dtype).to(device, dtype, copy=True)  # it lies below
                _project(frame, weight, coefficients[c, i])
        rest = range(basis, len(loads)) if held else range(len(loads))
        for c, i, weight in source.stream(rest) if rest else ():
            _project(frame, weight.to(dtype), coefficients[c, i])
        columns = basis * source.columns
        if frame is None:  # each row counts by its own energy
            sigma = torch.ones(keep, dtype=torch.float64)
            energies = sigma * float(source.squares[list(own)].sum()) / keep
            multipliers = _multipliers(energies.sqrt(), columns, "energy", scale)
            if scale != "none":
                coefficients.div_(multipliers[0].to(dtype))
            return Decomposition(route, None, sigma, coefficients, source.squares, own, multipliers)
        flat = coefficients.flatten(0, 1)
        if route == "randomized":
            frame = _rotate(flat, basis * layers, frame, keep)
            flat = flat.flatten()[: len(flat) * keep * d2].view(-1, keep, d2)
        energy = torch.zeros(keep, dtype=torch.float64, device=device)
        for one in flat[: basis * layers]:
            energy += torch.linalg.vector_norm(one.to(device), dim=1).double().square()
        sigma = energy.sqrt().cpu()
        kept = sigma > _rounding(d1, columns, dtype) * sigma.max()
        kept[0] = True  # all-zero weights keep one direction, whose coefficients are zero
        # Directions at rounding level get no row of V: divided by their Σ, noise would become training rows.
        chosen = kept.nonzero().flatten()
        sigma = sigma[chosen]
        multipliers = _multipliers(sigma, columns, weigh, scale)
        divisor = multipliers.clamp_min(torch.finfo(dtype).tiny).to(dtype).unsqueeze(1)
        if len(chosen) < keep:
            frame = frame[:, chosen.to(device)].contiguous()
            flat = _each(flat, len(chosen), lambda one: one[chosen.to(one.device)] / divisor.to(one.device))
        else:
            for one in flat:
                one.div_(divisor.to(one.device))
    coefficients = flat.view(len(loads), layers, len(chosen), d2)
    return Decomposition(route, frame, sigma, coefficients, source.squares, own, multipliers)


def _multipliers(sigma: Tensor, columns: int, weigh: Weighing, scale: Scaling) -> Tensor:
    """What rows of norm σ_k, over the base's `columns`, are divided by: (r,) float64."""
    multipliers = sigma if weigh == "direction" else torch.ones_like(sigma)
    if scale == "none":
        return multipliers
    rows = sigma / multipliers.clamp_min(torch.finfo(torch.float64).tiny)
    return multipliers * (math.sqrt(float(rows.square().mean()) / columns) or 1.0)


def _project(frame: Tensor | None, weight: Tensor, into: Tensor) -> None:
    """Coefficients of a weight in a frame, written straight to where they stay, if that is on the same device."""
    if frame is None:
        into.copy_(weight)
    elif into.device == weight.device:
        torch.mm(frame.T, weight, out=into)
    else:
        into.copy_(frame.T @ weight)


def _rotate(flat: Tensor, basis: int, frame: Tensor, keep: int) -> Tensor:
    """Turn coefficients in a frame (layers, rows, d2) into those of the `keep` leading directions in its span, in the
    same memory; `basis` of the layers count. Returns those directions, (d1, keep)."""
    rows = frame.shape[1]
    small = torch.zeros(rows, rows, dtype=torch.float64, device=frame.device)
    for one in flat[:basis]:
        add_gram(small, one.to(frame.device))
    turn = _leading(small, keep, frame.dtype).to(frame.device)
    left = frame @ turn
    turn *= _signs(left)
    _each(flat, keep, lambda one: turn.T @ one.to(frame.device))
    return _fix_signs(left)


def _each(flat: Tensor, rows: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace each of the layers (n, before, d2) by `change` of it, (n, rows, d2), rows ≤ before, in the same memory.
    `change` gives a tensor of its own.

    Layer i goes where layers 0 … i lay, all of which have been read.
    """
    n, _, d2 = flat.shape
    after = flat.flatten()[: n * rows * d2].view(n, rows, d2)
    for i in range(n):
        after[i] = change(flat[i])
    return after


def _rounding(d1: int, columns: int, dtype: torch.dtype) -> float:
    """Relative size below which a singular value is rounding: numpy.linalg.matrix_rank's rule with a square
    root, as the errors of a sum are random (1e-5 for 24 layers of 512 columns in float32), and never below
    what a Gram matrix holds."""
    return max(math.sqrt(max(d1, columns)) * torch.finfo(dtype).eps, 1e-7)


def _exact(source: Layers, own: range) -> Tensor:
    """U of the concatenation: (d1, min(d1, L·d2)), descending."""
    wide = torch.cat([weight.to(working_dtype(source.dtype)) for _, _, weight in source.stream(own)], dim=1)
    left: Tensor = torch.linalg.svd(wide, full_matrices=False).U
    return left


def _gram(source: Layers, own: range, device: str, room: Room | None) -> Tensor:
    """G = Σ W_i W_iᵀ: (d1, d1) float64, of which only the blocks on and below the diagonal are filled.

    On the device if it, its eigenvectors and eigh's workspace fit there, else in host memory, summed in row blocks.
    room: where to leave the layers.
    """
    d1 = source.shape[0]
    where = device if fits_device(EIGH_MATRICES * 8 * d1 * d1, device) else "cpu"
    gram = torch.zeros(d1, d1, dtype=torch.float64, device=where)
    for c, i, weight in source.stream(own):
        if room is not None:
            room.layer(c, i, source.shape, source.dtype).copy_(weight)
        add_gram(gram, weight)
    return gram


def add_gram(gram: Tensor, weight: Tensor) -> None:
    """gram += weight · weightᵀ on and below the diagonal, in row blocks; gram (d1, d1) float64 on any device.

    Half-precision weights are multiplied in float32 (on CUDA as they are, by tensor cores, with float32 sums): their
    products are exact there, a layer's sum is good to 1e-7 of the largest direction's energy, and sums over layers are
    float64. Directions below about 1e-3 of the largest then mix among themselves; such weights are themselves rounded
    to 2e-3 or more. All else is multiplied in float64.
    """
    halves = weight.dtype in (torch.bfloat16, torch.float16)
    if not halves:
        weight = weight.double()
    elif not weight.is_cuda:
        weight = weight.float()
    size = GRAM_BLOCK[weight.device.type]
    for start in range(0, len(weight), size):
        rows, end = weight[start : start + size], min(start + size, len(weight))
        target = gram[start:end, :end]
        if halves and weight.is_cuda:
            target += torch.mm(rows, weight[:end].T, out_dtype=torch.float32).to(gram.device)
        elif halves or gram.device != weight.device:
            # As doubles first: an addition of mixed types takes four times as long.
            target += (rows @ weight[:end].T).to(gram.device, torch.float64)
        else:
            target.addmm_(rows, weight[:end].T)


def _leading(gram: Tensor, keep: int, dtype: torch.dtype) -> Tensor:
    """The `keep` leading eigenvectors of a Gram matrix given by its lower triangle, descending: (d1, keep).

    The matrix is used up.
    """
    return _fix_signs(eigenvectors(gram)[:, -keep:].to(dtype).flip(1).contiguous())


def _range(source: Layers, own: range, rows: int, iterations: int, seed: int) -> Tensor:
    """An orthonormal frame that holds nearly all of the leading left singular vectors: (d1, rows) float64.

    Each iteration is Q ← orth(W Wᵀ Q), both products per layer in one pass, and is orthonormalised, or all
    columns would turn towards the first singular vector. Ω_i comes from a generator of its layer's own, so it
    does not depend on order.
    """
    d1, d2 = source.shape
    dtype = working_dtype(source.dtype)
    sample = torch.zeros(d1, rows, dtype=torch.float64, device=source.device)
    for c, i, weight in source.stream(own):
        omega = torch.randn(d2, rows, generator=generator_for(seed, "range", c * source.count + i), dtype=dtype)
        sample += weight.to(dtype) @ omega.to(source.device)
    found: Tensor = torch.linalg.qr(sample).Q
    for _ in range(iterations):
        narrow = found.to(dtype)
        sample.zero_()
        for _, _, weight in source.stream(own):
            local = weight.to(dtype)
            sample += local @ (local.T @ narrow)
            del local  # before the next one is converted
        found = torch.linalg.qr(sample).Q
    return found


def _fix_signs(left: Tensor) -> Tensor:
    """Turn each column so that its entry of largest magnitude is positive (in place): routes and libraries choose
    signs freely."""
    return left.mul_(_signs(left))


def _signs(left: Tensor) -> Tensor:
    """(columns,) of ±1."""
    return torch.where(left.amax(dim=0) < -left.amin(dim=0), -1.0, 1.0).to(left)
