"""Optimal-transport fusion against an independent Sinkhorn, written here in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lesa_ray.expansion import transport
from lesa_ray.expansion.transport import Role, fuse_layer, transport_map, transport_plan

ROLES = {
    "q.weight": Role.ATTENTION_INPUT,
    "q.bias": Role.OTHER_VECTOR,
    "o.weight": Role.ATTENTION_OUTPUT,
    "o.bias": Role.OTHER_VECTOR,
    "gate.weight": Role.MLP_INPUT,
    "down.weight": Role.MLP_OUTPUT,
    "norm1.weight": Role.OTHER_VECTOR,
    "norm2.weight": Role.NORM_BEFORE_MLP,
    "q_norm.weight": Role.OTHER_VECTOR,
}
D, FF = 24, 40


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(seed: int) -> dict[str, Tensor]:
    shapes = {
        "q.weight": (D, D),
        "q.bias": (D,),
        "o.weight": (D, D),
        "o.bias": (D,),
        "gate.weight": (FF, D),
        "down.weight": (D, FF),
        "norm1.weight": (D,),
        "norm2.weight": (D,),
        "q_norm.weight": (6,),
    }
    return {name: draw(*shape, seed=seed + i) / D**0.5 for i, (name, shape) in enumerate(shapes.items())}


def numpy_plan(lower: np.ndarray, upper: np.ndarray, reg: float = 0.06) -> np.ndarray:
    """The textbook iteration: K = exp(-C/reg), u = a / Kv, v = b / Kᵀu."""
    cost = np.linalg.norm(lower[:, None, :] - upper[None, :, :], axis=2)  # (n, m)
    kernel = np.exp(-cost / reg)
    u, v = np.ones(len(lower)), np.ones(len(upper))
    for _ in range(20_000):
        u = (1 / len(lower)) / (kernel @ v)
        v = (1 / len(upper)) / (kernel.T @ u)
        if np.abs(u * (kernel @ v) - 1 / len(lower)).max() < 1e-14:
            break
    return u[:, None] * kernel * v[None, :]


def by_hand(lower: dict[str, Tensor], upper: dict[str, Tensor], divide: bool) -> dict[str, np.ndarray]:
    """The rules of fusion written out for `layer`, name by name."""
    low = {name: tensor.double().numpy() for name, tensor in lower.items()}
    up = {name: tensor.double().numpy() for name, tensor in upper.items()}

    def row_map(below: np.ndarray, name: str) -> np.ndarray:
        return numpy_plan(below, up[name]) * (len(below) if divide else 1)

    t_q, t_o = row_map(low["q.weight"], "q.weight"), row_map(low["o.weight"], "o.weight")
    gate = low["gate.weight"] @ t_o
    aligned = {
        "q.weight": t_q.T @ low["q.weight"],
        "q.bias": t_q.T @ low["q.bias"],
        "o.weight": t_o.T @ low["o.weight"],
        "o.bias": t_o.T @ low["o.bias"],
        "gate.weight": row_map(gate, "gate.weight").T @ gate,
        "down.weight": row_map(low["down.weight"], "down.weight").T @ low["down.weight"],
        "norm1.weight": low["norm1.weight"],
        "norm2.weight": low["norm2.weight"] @ (t_o + np.eye(D)) / 2,
        "q_norm.weight": low["q_norm.weight"],
    }
    return {name: (aligned[name] + up[name]) / 2 for name in up}


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0])
def test_plan_is_that_of_a_plain_float64_sinkhorn(scale: float) -> None:
    lower, upper = draw(32, 20, seed=1) * scale, draw(32, 20, seed=2) * scale
    plan, solve = transport_plan(lower, upper, tolerance=1e-9)
    assert solve.converged
    assert solve.solver == "sinkhorn"
    expected = numpy_plan(lower.double().numpy(), upper.double().numpy())
    np.testing.assert_allclose(plan.numpy(), expected, rtol=0, atol=1e-7 / 32)


@pytest.mark.parametrize("divide", [True, False])
def test_every_role_follows_its_rule(divide: bool) -> None:
    lower, upper = layer(seed=10), layer(seed=50)
    fused = fuse_layer(lower, upper, ROLES, divide_marginals=divide, tolerance=1e-9)
    expected = by_hand(lower, upper, divide)
    assert list(fused.tensors) == list(ROLES)
    for name, tensor in fused.tensors.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert set(fused.solves) == {"q.weight", "o.weight", "gate.weight", "down.weight"}


def test_it_does_not_matter_in_which_order_a_layer_names_its_tensors() -> None:
    lower, upper = layer(seed=10), layer(seed=50)
    straight = fuse_layer(lower, upper, ROLES).tensors
    backwards = fuse_layer(lower, upper, dict(reversed(ROLES.items()))).tensors
    assert all(torch.equal(backwards[name], tensor) for name, tensor in straight.items())


def test_the_mlp_input_goes_through_attention_outputs_plan_and_attention_input_does_not() -> None:
    lower, upper = layer(seed=10), layer(seed=50)
    lower["q.weight"], upper["q.weight"] = lower["gate.weight"], upper["gate.weight"]
    names = ("q.weight", "o.weight", "gate.weight")
    fused = fuse_layer(lower, upper, {name: ROLES[name] for name in names}).tensors
    assert (fused["q.weight"] - fused["gate.weight"]).norm() > 0.1 * fused["q.weight"].norm()
    without = fuse_layer(lower, upper, {name: ROLES[name] for name in ("q.weight", "gate.weight")}).tensors
    assert torch.equal(without["gate.weight"], without["q.weight"])


def permuted(upper: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(upper), generator=torch.Generator().manual_seed(seed))
    return upper[order], order


@pytest.mark.parametrize("names", [("x.weight", "x.bias"), ("x[3]", "x_bias[3]"), ("x.weight[3]", "x.bias[3]")])
def test_permuted_rows_come_back_in_order_and_the_bias_with_them(names: tuple[str, str]) -> None:
    matrix, bias = names
    upper = {matrix: draw(64, 48, seed=3), bias: draw(64, seed=4)}  # rows about 10 apart
    weight, order = permuted(upper[matrix], seed=5)
    lower = {matrix: weight, bias: upper[bias][order]}
    for role in (Role.ATTENTION_INPUT, Role.ATTENTION_OUTPUT, Role.MLP_OUTPUT):
        fused = fuse_layer(lower, upper, {matrix: role, bias: Role.OTHER_VECTOR}).tensors
        torch.testing.assert_close(fused[matrix], upper[matrix], rtol=0, atol=1e-5)
        torch.testing.assert_close(fused[bias], upper[bias], rtol=0, atol=1e-5)
    plain = fuse_layer(lower, upper, {bias: Role.OTHER_VECTOR}).tensors
    assert torch.equal(plain[bias], (lower[bias] + upper[bias]) / 2)


def test_with_marginals_left_in_the_result_is_half_the_upper_layer() -> None:
    """1/256 of the aligned rows remains, so at most 0.4 % of the norm, for equal and for unrelated layers."""
    upper = {"x": draw(256, 256, seed=6) / 16}
    for below in (permuted(upper["x"], seed=7)[0], draw(256, 256, seed=8) / 16):
        fused = fuse_layer({"x": below}, upper, {"x": Role.ATTENTION_INPUT}, divide_marginals=False).tensors["x"]
        assert (fused - upper["x"] / 2).norm() < 0.004 * (upper["x"] / 2).norm()


@pytest.mark.parametrize("max_iterations", [3, 10_000])
def test_aligned_rows_are_weighted_means(max_iterations: int) -> None:
    plan, _ = transport_plan(draw(48, 8, seed=9), draw(48, 8, seed=10), max_iterations=max_iterations)
    weights = transport_map(plan)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(48, dtype=torch.float64))


@pytest.mark.parametrize("scale", [20.0, 1e4])
def test_distances_far_beyond_what_exp_can_hold(scale: float) -> None:
    """exp(-distance/reg) is 0 throughout; at these distances the plan is the assignment of least cost."""
    lower, upper = draw(32, 16, seed=11) * scale, draw(32, 16, seed=12) * scale
    cost = torch.cdist(lower.double(), upper.double())
    assert float(torch.exp(-cost / 0.06).max()) == 0
    plan, solve = transport_plan(lower, upper)
    assert solve.converged
    rows, columns = linear_sum_assignment(cost.numpy())
    best = float(cost[rows, columns].mean())
    assert best <= float((plan * cost).sum()) / float(plan.sum()) < best * 1.001


def test_outliers_that_want_the_same_partner() -> None:
    """Two lower rows far out beside one upper row: the second of them must go all the way back."""
    lower, upper = draw(64, 8, seed=13), draw(64, 8, seed=14)
    lower[3] += 500
    lower[5] += 510
    upper[2] += 505
    fused = fuse_layer({"x": lower}, {"x": upper}, {"x": Role.ATTENTION_INPUT})
    assert fused.solves["x"].converged
    assert torch.isfinite(fused.tensors["x"]).all()


def test_log_domain_follows_where_plain_sinkhorn_breaks_down(monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = draw(32, 16, seed=15) / 4, draw(32, 16, seed=16) / 4
    expected, _ = transport_plan(lower, upper, tolerance=1e-9)
    real = transport._sinkhorn

    def broken(cost: Tensor, solver: str, *settings: float) -> tuple[Tensor, transport.Solve, tuple[Tensor, Tensor]]:
        if solver == "sinkhorn_log":
            return real(cost, solver, *settings)  # type: ignore[arg-type]
        nothing = torch.full_like(cost, torch.nan)
        return nothing, transport.Solve(solver, 1, torch.nan, converged=False), (nothing[0], nothing[0])

    monkeypatch.setattr(transport, "_sinkhorn", broken)
    plan, solve = transport_plan(lower, upper, tolerance=1e-9)
    assert solve.solver == "sinkhorn_log"
    assert solve.converged
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-8 / 32)


def test_a_plan_that_did_not_converge_says_so_and_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    lower = draw(64, 64, seed=17) / 8
    solve = transport_plan(lower, lower + draw(64, 64, seed=18) / 12, max_iterations=20)[1]
    assert not solve.converged
    assert solve.iterations == 20
    assert solve.error > transport.TOLERANCE
    assert not recwarn.list


def test_bfloat16_layers_give_what_their_rounded_values_give() -> None:
    lower, upper = ({k: v.bfloat16() for k, v in layer(seed).items()} for seed in (20, 60))
    half = fuse_layer(lower, upper, ROLES).tensors
    full = fuse_layer({k: v.float() for k, v in lower.items()}, {k: v.float() for k, v in upper.items()}, ROLES).tensors
    assert all(torch.equal(half[name], full[name]) for name in ROLES)


def test_the_same_bytes_every_time() -> None:
    torch.set_num_threads(1)
    first, second = (fuse_layer(layer(seed=30), layer(seed=70), ROLES) for _ in range(2))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in ROLES)
    assert first.solves == second.solves


def test_wrong_input_is_named() -> None:
    good = layer(seed=40)
    for change, message in (
        ({"q.weight": draw(D, D + 1, seed=0)}, r"q\.weight: shape \(24, 24\) below and \(24, 25\) above"),
        ({"down.weight": torch.full((D, FF), torch.nan)}, r"down\.weight: holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_layer(good, {**good, **change}, ROLES)
    with pytest.raises(ValueError, match=r"norm1\.weight: mlp input must be a matrix"):
        fuse_layer(good, good, {"norm1.weight": Role.MLP_INPUT})
    with pytest.raises(ValueError, match=r"down\.weight: last axis of \(24, 40\) does not fit a map of 24 rows"):
        fuse_layer(good, good, {"o.weight": Role.ATTENTION_OUTPUT, "down.weight": Role.MLP_INPUT})
    with pytest.raises(ValueError, match="one attention output expected"):
        fuse_layer(good, good, {"o.weight": Role.ATTENTION_OUTPUT, "q.weight": Role.ATTENTION_OUTPUT})
