"""Fusing two neighbouring layers by optimal transport: the arithmetic of OpT-DeUS (arXiv 2508.08011).

The rows of a weight matrix are neurons, in an order that means nothing: row 3 of layer i and row 3 of layer
i+1 need not be alike. So before two layers are averaged, the rows of the lower are brought into the order of
the upper's by a transport plan T between the two sets of rows, and what follows a reordered matrix has its
input side reordered to match.

What it decides - T[a, b] is the mass that goes from lower row a to upper row b, at a cost of their Euclidean
distance, with   uniform marginals and entropic regularisation 0.06 (Model/OT-DUS.py in
github.com/voalmciaf/OpT-DeUS). - A plan becomes a map by division by its target marginal, so that every
aligned row is a weighted mean of lower   rows. Optimal-transport fusion defines it so (arXiv 1910.05653,
algorithm 1; sidak/otfusion and   graldij/transformer-fusion both do), and so do we. The released code of
OpT-DeUS leaves 1/n in: its aligned   half is n times too small and what it builds is the upper layer's
weights, halved. `divide_marginals=False`. - POT solves, in float64 and on shifted costs, for three reasons
found by measurement. In float32 (the released   code) rows with distances from about 2 already make
exp(-cost/reg) vanish: POT stops with "numerical errors"   and hands back a plan of nearly zero mass. In
float64 that begins at about 45. And the released threshold,   POT's 1e-9, lies below float32's rounding for
up to about 1,000 rows, so that all 10,000 iterations run.   Taking from every row and column of the costs its
minimum leaves the plan as it is (under given marginals it   adds a constant to what is minimised) and puts a
1 into every row and column of exp(-cost/reg).   Should plain Sinkhorn still break down, `sinkhorn_log`
follows; it cannot, and takes 10-40 times as long.

Cost, one core: 0.2 ms an iteration at 512 rows, 1.2 ms at 1,376, 10 to some hundreds of iterations where rows
lie
1-2 apart; hard cases run into `max_iterations`, which the report says. Memory: about 5 n² doubles for n rows
(33 GB at 28,672), freed after each tensor; besides it the two matrices, and attention's n² map for the MLP.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import ot
import torch
from torch import Tensor

REGULARISATION = 0.06
"""Entropic regularisation, in units of the distance between rows (released code)."""
MAX_ITERATIONS = 10_000
"""Sinkhorn iterations at most (released code)."""
TOLERANCE = 1e-6
"""Largest relative error of a marginal. Ours: stopping here instead of at POT's 1e-9 halves the iterations
and
moves the aligned matrix by about 1e-6 of its norm, a thousandth of what bfloat16 can show."""


class Role(Enum):
    """What a tensor is in its layer; it decides what its rows and its input side go through."""

    ATTENTION_INPUT = "attention input"
    """q, k, v, or fused: rows by their own plan, input side as it is."""
    ATTENTION_OUTPUT = "attention output"
    """o_proj, dense, c_proj: the same, and its plan goes on to the MLP. At most one in a layer."""
    MLP_INPUT = "mlp input"
    """gate, up, fc1, w1, w3, or fused: input side by attention output's plan, then rows by its own plan."""
    MLP_OUTPUT = "mlp output"
    """down, fc2, w2: rows by their own plan, input side as it is (the paper does not carry gate's plan
    here)."""
    NORM_BEFORE_ATTENTION = "norm before attention"
    """Mean of the two, weight and bias."""
    NORM_BEFORE_MLP = "norm before mlp"
    """Through ½(T_o + I), as its input is the residual stream plus attention's output; then the mean."""
    OTHER_VECTOR = "other vector"
    """The bias of a matrix goes through its matrix's plan like one more column; any other vector: the
    mean."""
    OTHER_MATRIX = "other matrix"
    """As attention input."""
    AVERAGE = "average"
    """The mean, of any shape: for rows whose order is meant (a router's experts), and for what is not 2-D."""


@dataclass(frozen=True)
class Solve:
    """How one transport plan was found."""

    solver: str
    """POT's name of the method: `sinkhorn`, or `sinkhorn_log` where that broke down."""
    iterations: int
    error: float
    """Of the marginals, relative: max(‖T·1 - a‖/‖a‖, ‖Tᵀ·1 - b‖/‖b‖)."""
    converged: bool
    """False: the plan is the last one found, and its marginals are wrong by `error`."""


@dataclass(frozen=True)
class Fused:
    """A layer between two."""

    tensors: dict[str, Tensor]
    """float32, on the CPU, named as in the layers."""
    solves: dict[str, Solve]
    """For every matrix that was aligned, how its plan was found."""


@torch.no_grad()
def fuse_layer(
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    roles: Mapping[str, Role],
    *,
    divide_marginals: bool = True,
    reg: float = REGULARISATION,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    device: str | torch.device = "cpu",
) -> Fused:
    """Make the layer between `lower` and `upper`: for each name in `roles`, (aligned lower + upper) / 2.

    Matrices come as (out_features, in_features), in any floating type. The mappings may read tensors when
    asked:
    each is asked for once. Zeroing the projections into the residual stream is the caller's.

    A bias is found by its matrix's name (`x.bias` for `x.weight`) and goes through that matrix's plan: our
    rule,
    the paper's models have none. Without an attention output, the MLP's input side stays as it is.

    Raises: ValueError naming the tensor whose shape does not fit its role.
    """
    outputs = [name for name, role in roles.items() if role is Role.ATTENTION_OUTPUT]
    if len(outputs) > 1:
        raise ValueError(f"one attention output expected in a layer, found {', '.join(outputs)}")
    biases = {_bias_of(name) for name, role in roles.items() if role in _ALIGNED}
    biases = {name for name in biases if roles.get(name) is Role.OTHER_VECTOR}

    def load(name: str) -> tuple[Tensor, Tensor]:
        pair = lower[name].to(device).double(), upper[name].to(device).double()
        if pair[0].shape != pair[1].shape:
            raise ValueError(f"{name}: shape {tuple(pair[0].shape)} below and {tuple(pair[1].shape)} above")
        return pair

    fused: dict[str, Tensor] = {}
    solves: dict[str, Solve] = {}
    mlp_map: Tensor | None = None  # (d, d) lower → upper residual coordinates, by attention output's plan
    for name in sorted(roles, key=lambda name: name not in outputs):  # stable: attention output first
        role = roles[name]
        if name in biases:
            continue
        below, above = load(name)
        if role in _ALIGNED:
            if below.ndim != 2:
                raise ValueError(f"{name}: {role.value} must be a matrix, found shape {tuple(below.shape)}")
            if role is Role.MLP_INPUT and mlp_map is not None:
                below = below @ _fitting(mlp_map, name, below)
            plan, solves[name] = transport_plan(
                below, above, reg=reg, max_iterations=max_iterations, tolerance=tolerance
            )
            row_map = transport_map(plan) if divide_marginals else plan
            del plan
            below = row_map.T @ below
            if (bias := _bias_of(name)) in biases:
                bias_below, bias_above = load(bias)
                fused[bias] = _mean(bias_below @ _fitting(row_map, bias, bias_below), bias_above)
            if role is Role.ATTENTION_OUTPUT:
                mlp_map = row_map
        elif role is Role.NORM_BEFORE_MLP and mlp_map is not None:
            below = (below @ _fitting(mlp_map, name, below) + below) / 2
        fused[name] = _mean(below, above)
    return Fused({name: fused[name] for name in roles}, solves)


_ALIGNED = frozenset({Role.ATTENTION_INPUT, Role.ATTENTION_OUTPUT, Role.MLP_INPUT, Role.MLP_OUTPUT, Role.OTHER_MATRIX})


@torch.no_grad()
def transport_plan(
    lower: Tensor,
    upper: Tensor,
    *,
    reg: float = REGULARISATION,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Solve]:
    """The entropic transport plan between rows: (n, d) and (m, d) to (n, m), in float64, of total mass 1."""
    cost = torch.cdist(lower.double(), upper.double(), p=2)  # (n, m)
    cost -= cost.amin(dim=1, keepdim=True)
    cost -= cost.amin(dim=0, keepdim=True)
    plan, solve = _solve(cost, "sinkhorn", reg, max_iterations, tolerance)
    if not solve.converged and solve.iterations < max_iterations:  # stopped early, so it broke down
        plan, solve = _solve(cost, "sinkhorn_log", reg, max_iterations, tolerance)
    return plan, solve


def transport_map(plan: Tensor) -> Tensor:
    """Divide a plan (n, m) by its target marginal: column b holds the weights of the lower rows in aligned
    row b.

    By the marginal that the plan has, not by 1/m, which it has only when converged: the weights always sum to
    1.
    """
    return plan / plan.sum(dim=0, keepdim=True)


def _solve(cost: Tensor, solver: str, reg: float, max_iterations: int, tolerance: float) -> tuple[Tensor, Solve]:
    """One run of POT's Sinkhorn, judged by the marginals of the plan that comes back."""
    rows, columns = cost.shape
    a = cost.new_full((rows,), 1 / rows)
    b = cost.new_full((columns,), 1 / columns)
    with warnings.catch_warnings():
        # What POT warns of is read off the plan below. Its threshold is on ‖Tᵀ·1 - b‖, and ‖b‖ = 1/√m.
        warnings.simplefilter("ignore")
        plan, log = ot.sinkhorn(
            a,
            b,
            cost,
            reg,
            method=solver,
            numItermax=max_iterations,
            stopThr=tolerance / columns**0.5,
            log=True,
            warn=False,
        )
    error = max(
        float(torch.linalg.vector_norm(plan.sum(dim=1) - a)) * rows**0.5,
        float(torch.linalg.vector_norm(plan.sum(dim=0) - b)) * columns**0.5,
    )
    # The last hundredth is for the sums' rounding. NaN compares as false, and so as not converged.
    return plan, Solve(solver, log["niter"] + 1, error, error <= 1.01 * tolerance)


def _mean(below: Tensor, above: Tensor) -> Tensor:
    return ((below + above) / 2).float().cpu()


def _bias_of(name: str) -> str:
    """The name a matrix's bias would have."""
    return name.removesuffix("weight") + "bias"


def _fitting(mapping: Tensor, name: str, tensor: Tensor) -> Tensor:
    """`mapping` (n, m), if the last axis of `tensor` has n entries."""
    if tensor.shape[-1:] != mapping.shape[:1]:
        raise ValueError(f"{name}: last axis of {tuple(tensor.shape)} does not fit a map of {mapping.shape[0]} rows")
    return mapping
