"""Ridge against a plain solution from the full design matrix in float64, and the two other yardsticks."""

import numpy as np
import pytest
import torch

from lesa_ray.lesa import ridge, yardsticks

PENALTY = 1e-3


def design(coefficients: torch.Tensor, middles: list[int]) -> tuple[np.ndarray, np.ndarray]:
    v = coefficients.double().numpy()
    x = np.concatenate([np.concatenate([v[m - 1], v[m + 1]], axis=1) for m in middles])
    return x, np.concatenate([v[m] for m in middles])


def plain_solution(coefficients: torch.Tensor, middles: list[int], penalty: float = PENALTY) -> np.ndarray:
    x, y = design(coefficients, middles)
    return np.linalg.solve(x.T @ x + penalty * np.diag(x.T @ x).mean() * np.eye(x.shape[1]), x.T @ y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize(
    "middles",
    [[1], [1, 2, 3, 4, 5, 6], [1, 4], [2, 3, 6], [1, 2, 6, 9, 10, 11]],
    ids=["one", "all", "apart", "gaps", "two checkpoints of 8 and 5 layers"],
)
def test_ridge_is_the_plain_solution(monkeypatch, dtype, block, middles):
    monkeypatch.setattr(ridge, "RIDGE_BLOCK", block)
    v = torch.randn(13, 20, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x, y = design(v, middles)
    gram, cross = ridge.normal_equations(v, middles, "cpu")
    assert {panel.dtype for _, _, panel in gram.panels} == {cross.dtype} == {dtype}
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    for start, end, panel in gram.panels:
        for row in range(start, end):
            np.testing.assert_allclose(panel[row - start, : row + 1], (x.T @ x)[row, : row + 1], atol=precision * 20)
    np.testing.assert_allclose(cross.numpy(), x.T @ y, atol=precision * 20)

    lower, upper = v[middles[0] - 1], v[middles[0] + 1]
    predicted = ridge.fit_ridge(v, middles, PENALTY, "cpu")(lower, upper)
    assert predicted.dtype == dtype
    expected = np.concatenate([lower.numpy(), upper.numpy()], axis=1) @ plain_solution(v, middles)
    np.testing.assert_allclose(predicted.numpy(), expected, atol=precision * 20)


@pytest.mark.parametrize(
    ("spread", "penalty", "doubled"),
    [(1.0, 1e-3, False), (1e-2, 1e-7, True), (1e-3, 1e-6, True)],
    ids=["well conditioned", "float32 is off by 2e-4", "float32 finds no Cholesky factor"],
)
def test_float32_is_used_only_where_its_rounding_is_small_beside_the_penalty(monkeypatch, spread, penalty, doubled):
    """In every case the prediction is that of float64."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(80, 1, generator=generator) * torch.randn(1, 60, generator=generator)
    v = spread * torch.randn(9, 80, 60, generator=generator) + (common if spread < 1 else 0)
    dtypes = []

    def spy(coefficients, middles, device, dtype=None):
        dtypes.append(dtype)
        return normal_equations(coefficients, middles, device, dtype)

    normal_equations = ridge.normal_equations
    monkeypatch.setattr(ridge, "normal_equations", spy)
    middles = list(range(1, 8))
    predicted = ridge.fit_ridge(v, middles, penalty, "cpu")(v[0], v[2]).double()
    assert dtypes == ([None, torch.float64] if doubled else [None])
    x, _ = design(v, [1])
    expected = torch.from_numpy(x @ plain_solution(v, middles, penalty))
    assert float((predicted - expected).norm()) < 2e-6 * float(expected.norm())


def test_ridge_finds_a_linear_rule():
    v = torch.randn(7, 300, 10, generator=torch.Generator().manual_seed(0))
    rule = torch.randn(20, 10, generator=torch.Generator().manual_seed(1)) / 5
    for m in (1, 3, 5):
        v[m] = torch.cat([v[m - 1], v[m + 1]], dim=1) @ rule
    fitted = ridge.fit_ridge(v, [1, 3], PENALTY, "cpu")
    error = fitted(v[4], v[6]) - v[5]
    assert float(error.norm()) < 0.01 * float(v[5].norm())


@pytest.mark.parametrize("case", ["zero", "identical", "fewer rows than unknowns"])
def test_ridge_is_finite_where_the_system_is_singular(case):
    v = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0))
    if case == "zero":
        v.zero_()
    if case == "identical":
        v[:] = v[0]
    predicted = ridge.fit_ridge(v, [1], PENALTY, "cpu")(v[0], v[2])
    assert bool(predicted.isfinite().all())
    assert float((predicted - v[1]).norm()) <= 0.02 * float(v[1].norm())


def test_zero_and_mean():
    lower, upper = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]])
    assert yardsticks.zero(lower, upper).tolist() == [[0, 0]]
    assert yardsticks.mean(lower, upper).tolist() == [[2, -1]]


def test_ridge_is_left_out_with_a_reason_where_it_would_cost_too_much():
    assert ridge.why_no_ridge(4096, "cpu") is None
    assert ridge.why_no_ridge(4097, "cpu") == "8194 features; it is a yardstick up to 8192 on this kind of device"
    assert ridge.why_no_ridge(8192, "cuda") is None
    assert ridge.why_no_ridge(28672, "cuda:1") is not None


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_on_a_gpu_ridge_is_the_same(where):
    v = torch.randn(9, 80, 60, generator=torch.Generator().manual_seed(0))
    predicted = ridge.fit_ridge(v.to(where), [1, 2, 5, 7], PENALTY, "cuda")(v[0], v[2])
    assert predicted.is_cuda
    expected = ridge.fit_ridge(v, [1, 2, 5, 7], PENALTY, "cpu")(v[0], v[2])
    torch.testing.assert_close(predicted.cpu(), expected, rtol=0, atol=1e-4)
