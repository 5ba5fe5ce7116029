"""Fusing two neighbouring layers by optimal transport: the arithmetic of OpT-DeUS (arXiv 2508.08011).

The rows of a weight matrix are neurons, in an order that means nothing: row 3 of one layer and row 3 of the next
need not be alike. So before two layers are averaged, the rows of the lower are brought into the order of the
upper's by a transport plan T between the two sets of rows, and what reads a reordered matrix has its input side
reordered to match.

What it decides
- T[a, b] is the mass that goes from lower row a to upper row b, at a cost of their Euclidean distance, with
  uniform marginals and entropic regularisation 0.06 (Model/OT-DUS.py in github.com/voalmciaf/OpT-DeUS).
- A plan becomes a map by division by its target marginal, so that every aligned row is a weighted mean of lower
  rows. Optimal-transport fusion means it so (arXiv 1910.05653; sidak/otfusion and, for transformers,
  graldij/transformer-fusion). The released code of OpT-DeUS leaves 1/n in: its aligned half is n times too small
  and what it builds is the upper layer's weights, halved. `divide_marginals=False` does that.
- POT solves, in float64, on shifted costs, and only as far as weights can show. The released code solves in
  float32: exp(-cost/reg) vanishes there from distances of about 6 (45 in float64), and one row without a near
  partner is enough for POT to stop with "numerical errors" and a plan of next to no mass. And its threshold,
  POT's 1e-9, is below float32's rounding for up to about 1,000 rows, so that all 10,000 iterations run.
- Sinkhorn is slow where rows have one clear partner each (10,000 iterations do not reach 1e-6). If a first
  attempt fails, costs are solved at larger regularisations first, each starting where the last one ended
  (ε-scaling, arXiv 1610.06519); the plan is the same, in 300-1,900 iterations on every hard case tried. POT has
  its own ε-scaling, which gets stuck (PythonOT/POT issue 748). `sinkhorn_log` remains for what breaks down.

Cost on one core: 0.06 s for a layer of a trained toy (d = 192; rows without clear partners, 11 iterations each);
d = 512 with 1,376 neurons: 0.6 s so, 4 s where every matrix is hard (45 s without ε-scaling, and not converged).
Memory: about 5 n² doubles for n rows (33 GB at 28,672), freed after each tensor; besides it the two matrices, and
attention's n² map for the MLP. Measured: 5.1 to 5.3 n².
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import ot
import torch
from torch import Tensor

from lesa_ray.checkpoint.names import item_name, item_of

REGULARISATION = 0.06
"""Entropic regularisation, in units of the distance between rows (released code)."""
MAX_ITERATIONS = 10_000
"""Sinkhorn iterations at most (released code)."""
TOLERANCE = 1e-4
"""Largest relative error of a marginal. Ours: it moves the aligned matrix by 5e-5 of its norm on near-permutations,
where bfloat16 rounds by 2e-3; 1e-5 takes 7 times as many iterations there."""
FIRST_ATTEMPT = 100
"""Iterations after which a plan counts as hard, and iterations at each larger regularisation. Measured."""
ROUGH = 1e-3
"""Relative error of a marginal at which a larger regularisation has served."""


class Role(Enum):
    """What a tensor is in its layer; it decides what its rows and its input side go through."""

    ATTENTION_INPUT = "attention input"
    """q, k, v, or fused: rows by their own plan, input side as it is."""
    ATTENTION_OUTPUT = "attention output"
    """o_proj, dense, c_proj: the same, and its plan goes on to the MLP. At most one in a layer."""
    MLP_INPUT = "mlp input"
    """gate, up, fc1, w1, w3, or fused: input side by attention output's plan, then rows by its own plan."""
    MLP_OUTPUT = "mlp output"
    """down, fc2, w2: rows by their own plan, input side as it is (the paper does not carry gate's plan here)."""
    NORM_BEFORE_MLP = "norm before mlp"
    """Through ½(T_o + I), as its input is the residual stream plus attention's output; then the mean."""
    OTHER_VECTOR = "other vector"
    """The bias of a matrix goes through its matrix's plan like one more column; any other vector: the mean."""


@dataclass(frozen=True)
class Solve:
    """How one transport plan was found."""

    solver: str
    """POT's name of the method: `sinkhorn`, or `sinkhorn_log` where that broke down."""
    iterations: int
    """In all, those at larger regularisations included."""
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

    Matrices come as (out_features, in_features), in any floating type. The mappings may read a tensor when it is
    asked for, which happens once. Zeroing the projections into the residual stream is the caller's.

    A bias is found by its matrix's name (`x.bias` for `x.weight`) and goes through that matrix's plan: our rule, the
    paper's models have none. Without an attention output, the MLP's input side stays as it is.

    Raises: ValueError naming the tensor whose shape does not fit its role, or that is not finite.
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
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pair):
            raise ValueError(f"{name}: holds values that are not finite")
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


_ALIGNED = frozenset({Role.ATTENTION_INPUT, Role.ATTENTION_OUTPUT, Role.MLP_INPUT, Role.MLP_OUTPUT})


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
    # A constant taken off a row or column of the costs adds a constant to what is minimised: the plan is the same.
    # Now every row and column of exp(-cost/reg) holds a 1.
    cost -= cost.amin(dim=1, keepdim=True)
    cost -= cost.amin(dim=0, keepdim=True)

    plan, solve, _ = _sinkhorn(cost, "sinkhorn", reg, min(FIRST_ATTEMPT, max_iterations), tolerance)
    spent = solve.iterations
    if solve.converged or spent >= max_iterations:
        return plan, solve
    del plan
    for larger in _larger(reg, float(cost.mean())):
        if spent >= max_iterations:
            break
        # A rough solution, taken off the costs: what the next regularisation has left to find is little.
        iterations = min(FIRST_ATTEMPT, max_iterations - spent)
        stage, (row, column) = _sinkhorn(cost, "sinkhorn", larger, iterations, ROUGH)[1:]  # its plan goes at once
        spent += stage.iterations
        if bool(torch.isfinite(row).all()) and bool(torch.isfinite(column).all()):
            cost -= row[:, None]
            cost -= column[None, :]
    for solver in ("sinkhorn", "sinkhorn_log"):
        budget = max(1, max_iterations - spent)
        plan = cost.new_empty(0)  # what another solver left goes first
        plan, solve, _ = _sinkhorn(cost, solver, reg, budget, tolerance)
        spent += solve.iterations
        if solve.converged or solve.iterations == budget:
            break  # else it stopped early: it broke down
    return plan, replace(solve, iterations=spent)


def transport_map(plan: Tensor) -> Tensor:
    """Divide a plan (n, m) by its target marginal: column b holds the weights of the lower rows in aligned row b.

    By the marginal that the plan has, not by 1/m, which it has only when converged: the weights always sum to 1.
    """
    mass = plan.sum(dim=0, keepdim=True)  # (1, m)
    assert bool((mass > 0).all()), "a transport plan without mass"
    return plan / mass


def _larger(reg: float, scale: float) -> list[float]:
    """Regularisations to come down by: halvings from half the mean cost, then smaller steps near `reg`.

    Measured on near-permutations, outliers and heavy tails: halvings to the end need 2-3 times the iterations.
    """
    found = []
    step = scale / 2
    while step > 2 * reg:
        found.append(step)
        step /= 2
    return [*found, 2 * reg, 5 / 3 * reg, 4 / 3 * reg, 7 / 6 * reg]


def _sinkhorn(
    cost: Tensor, solver: str, reg: float, iterations: int, tolerance: float
) -> tuple[Tensor, Solve, tuple[Tensor, Tensor]]:
    """One run of POT: the plan (n, m), how good it is, and the potentials of rows (n,) and columns (m,)."""
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
            numItermax=iterations,
            stopThr=tolerance / columns**0.5,
            log=True,
            warn=False,
        )
    error = max(
        float(torch.linalg.vector_norm(plan.sum(dim=1) - a)) * rows**0.5,
        float(torch.linalg.vector_norm(plan.sum(dim=0) - b)) * columns**0.5,
    )
    # The last hundredth is for the sums' rounding. NaN compares as false, and so as not converged.
    solve = Solve(solver, log["niter"] + 1, error, error <= 1.01 * tolerance)
    return plan, solve, (reg * torch.log(log["u"]), reg * torch.log(log["v"]))


def _mean(below: Tensor, above: Tensor) -> Tensor:
    return ((below + above) / 2).float().cpu()


def _bias_of(name: str) -> str:
    """The name that a matrix's bias would have: `x.bias` of `x.weight`, `x_bias[3]` of `x[3]`."""
    item = item_of(name)
    if item is None:
        return name.removesuffix("weight") + "bias"
    whole, index = item
    return item_name(whole.removesuffix("weight") + "bias" if whole.endswith("weight") else f"{whole}_bias", index)


def _fitting(mapping: Tensor, name: str, tensor: Tensor) -> Tensor:
    """`mapping` (n, m), if the last axis of `tensor` has n entries."""
    if tensor.shape[-1:] != mapping.shape[:1]:
        raise ValueError(f"{name}: last axis of {tuple(tensor.shape)} does not fit a map of {mapping.shape[0]} rows")
    return mapping
