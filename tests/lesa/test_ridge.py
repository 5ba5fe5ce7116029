"""Yardsticks: ridge against a plain solution from the full design matrix in float64."""

import numpy as np
import pytest
import torch

from lesa_ray.lesa import yardsticks


def design(coefficients: torch.Tensor, middles: list[int]) -> tuple[np.ndarray, np.ndarray]:
    v = coefficients.double().numpy()
    x = np.concatenate([np.concatenate([v[m - 1], v[m + 1]], axis=1) for m in middles])
    return x, np.concatenate([v[m] for m in middles])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "middles",
    [[1], [1, 2, 3, 4, 5, 6], [1, 4], [2, 3, 6], [1, 2, 6, 9, 10, 11]],
    ids=["one", "all", "apart", "gaps", "two checkpoints of 8 and 5 layers"],
)
def test_ridge_is_the_plain_solution(dtype, middles):
    v = torch.randn(13, 20, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x, y = design(v, middles)
    gram, cross = yardsticks.normal_equations(v, middles, "cpu")
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(gram.numpy(), x.T @ x, atol=precision * 20)
    np.testing.assert_allclose(cross.numpy(), x.T @ y, atol=precision * 20)

    penalty = yardsticks.RIDGE * np.diag(x.T @ x).mean()
    solution = np.linalg.solve(x.T @ x + penalty * np.eye(12), x.T @ y)
    lower, upper = v[middles[0] - 1], v[middles[0] + 1]
    predicted = yardsticks.fit_ridge(v, middles, "cpu")(lower, upper)
    assert predicted.dtype == dtype
    expected = np.concatenate([lower.numpy(), upper.numpy()], axis=1) @ solution
    np.testing.assert_allclose(predicted.numpy(), expected, atol=precision * 20)


def test_ridge_finds_a_linear_rule():
    v = torch.randn(7, 300, 10, generator=torch.Generator().manual_seed(0))
    rule = torch.randn(20, 10, generator=torch.Generator().manual_seed(1)) / 5
    for m in (1, 3, 5):
        v[m] = torch.cat([v[m - 1], v[m + 1]], dim=1) @ rule
    fitted = yardsticks.fit_ridge(v, [1, 3], "cpu")
    error = fitted(v[4], v[6]) - v[5]
    assert float(error.norm()) < 0.01 * float(v[5].norm())


@pytest.mark.parametrize("case", ["zero", "identical", "fewer rows than unknowns"])
def test_ridge_is_finite_where_the_system_is_singular(case):
    v = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0))
    if case == "zero":
        v.zero_()
    if case == "identical":
        v[:] = v[0]
    predicted = yardsticks.fit_ridge(v, [1], "cpu")(v[0], v[2])
    assert bool(predicted.isfinite().all())
    assert float((predicted - v[1]).norm()) <= 0.02 * float(v[1].norm())


def test_zero_and_mean():
    lower, upper = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]])
    assert yardsticks.zero(lower, upper).tolist() == [[0, 0]]
    assert yardsticks.mean(lower, upper).tolist() == [[2, -1]]


def test_ridge_is_left_out_with_a_reason_where_it_would_cost_too_much():
    assert yardsticks.why_no_ridge(4096, "cpu") is None
    assert yardsticks.why_no_ridge(4097, "cpu") == "8194 features; ridge is fitted up to 8192 on this kind of device"
    assert yardsticks.why_no_ridge(8192, "cuda") is None
    assert yardsticks.why_no_ridge(28672, "cuda:1") is not None
