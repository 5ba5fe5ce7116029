"""A spectrum that is solved in parts is that of the whole, whatever its shape; one that cannot be split is told."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lesa_ray.lesa import eigen
from lesa_ray.lesa import split_eigh as module
from lesa_ray.lesa.split_eigh import SplitError, split_eigh
from tests.lesa.layers import related_layers

N = 120
SPECTRA = {
    "decaying": torch.logspace(2, -8, N, dtype=torch.float64),
    "even": torch.linspace(-1, 2, N, dtype=torch.float64),
    "of low rank, and noise": torch.cat([torch.full((70,), 1e-12), torch.logspace(3, 0, 50)]).double(),
    "in clusters": torch.tensor([1.0, 3.0, 10.0, 30.0]).double().repeat_interleave(N // 4),
    "one large direction": torch.cat([torch.linspace(1, 2, N - 1), torch.tensor([1e9])]).double(),
}


def with_spectrum(values: torch.Tensor) -> torch.Tensor:
    turns = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    matrix = (turns * values) @ turns.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("most", [80, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_are_those_of_the_whole(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(SPECTRA[name])
    expected = np.linalg.eigvalsh(matrix.numpy())
    solved, eigh = [], torch.linalg.eigh

    def watched(given: torch.Tensor) -> torch.Tensor:
        solved.append(len(given))
        return eigh(given)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    kept = matrix.clone()
    values, vectors = split_eigh(matrix, most)
    assert torch.equal(matrix, kept)
    parts = [rows for rows in solved if rows != 96]  # those of Lanczos
    assert max(solved) <= max(most, 96)
    assert sum(parts) >= N
    largest = np.abs(expected).max()
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-13 * largest)
    np.testing.assert_allclose((matrix @ vectors).numpy(), (vectors * values).numpy(), rtol=0, atol=1e-12 * largest)
    np.testing.assert_allclose((vectors.T @ vectors).numpy(), np.eye(N), rtol=0, atol=1e-13)


def test_a_cluster_that_is_larger_than_a_part_is_told() -> None:
    matrix = torch.zeros(N, N, dtype=torch.float64)
    matrix[100:, 100:] = torch.eye(20, dtype=torch.float64)
    with pytest.raises(SplitError):
        split_eigh(matrix, 60)


def test_parts_that_are_not_apart_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_spectrum(SPECTRA["even"])
    monkeypatch.setattr(module, "_basis", lambda projector, *_: torch.eye(len(projector), dtype=projector.dtype))
    before = matrix.clone()
    with pytest.raises(SplitError, match="are not apart"):
        split_eigh(matrix, 80)
    assert torch.equal(matrix, before)


def test_the_gram_route_takes_it_where_the_solver_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """The triangle above the diagonal is not filled. One that cannot be split is solved whole."""
    wide = torch.cat(related_layers(4, 60, 24, decay=0.9), dim=1).double()
    whole = wide @ wide.T
    gram = whole.tril() + torch.full_like(whole, 7.0).triu(1)
    expected = np.linalg.eigh(whole.numpy())[1]
    with caplog.at_level(logging.WARNING):
        found = eigen._in_parts(gram.clone(), 40)
    assert not caplog.records
    np.testing.assert_allclose(np.abs(found.numpy().T @ expected), np.eye(60), atol=1e-6)
    flat = torch.eye(60, dtype=torch.float64) * 0
    found = eigen._in_parts(flat, 40)
    np.testing.assert_allclose(found.numpy().T @ found.numpy(), np.eye(60), atol=1e-12)
    assert "cuSOLVER does not take a matrix of 60 rows, and" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    matrix = with_spectrum(SPECTRA["decaying"])
    values, vectors = split_eigh(matrix.cuda(), 80)
    np.testing.assert_allclose(values.cpu().numpy(), np.linalg.eigvalsh(matrix.numpy()), rtol=0, atol=1e-11)
    assert (matrix.cuda() @ vectors - vectors * values).abs().max() < 1e-11
