"""NaN and Inf are found in raw bytes wherever they stand, and nothing else is taken for them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lesa_ray import UserError
from lesa_ray.checkpoint.finite import FiniteCheck, all_finite, assert_finite
from tests.allocations import Largest

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
BAD = [float("nan"), float("inf"), float("-inf")]
MANY = 700_001  # more than one block of every type


def raw(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def feed_in_chunks(checks: list[FiniteCheck], data: bytes) -> None:
    """As they are copied: a chunk may hold the end of one tensor and the beginning of the next."""
    for start in range(0, len(data), 4096):
        FiniteCheck.feed(checks, data[start : start + 4096])


@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_finite_value_passes(dtype: str) -> None:
    info = torch.finfo(TYPES[dtype])
    extremes = [info.max, info.min, info.tiny, -info.tiny, info.tiny / 2, 0.0, -0.0, 1.0]
    values = torch.tensor(extremes, dtype=TYPES[dtype])
    assert torch.isfinite(values).all()
    FiniteCheck.feed([FiniteCheck("w", dtype, len(raw(values)))], raw(values))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_65536_patterns_are_judged_as_torch_judges_them(dtype: str) -> None:
    patterns = torch.from_numpy(np.arange(2**16, dtype=np.uint16)).view(TYPES[dtype])
    for value, finite in zip(patterns.split(1), torch.isfinite(patterns).tolist(), strict=True):
        try:
            FiniteCheck.feed([FiniteCheck("w", dtype, 2)], raw(value))
            judged = True
        except UserError:
            judged = False
        assert judged == finite, value


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", [0, 1, MANY // 2, MANY - 1])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_one_bad_value_anywhere_is_found_and_its_tensor_named(
    dtype: str, place: int, value: float, tmp_path: Path
) -> None:
    good, bad = torch.randn(1000).to(TYPES[dtype]), torch.randn(MANY).to(TYPES[dtype])
    bad[place] = value
    data = raw(good) + raw(bad)

    def checks() -> list[FiniteCheck]:
        return [FiniteCheck("good", dtype, len(raw(good))), FiniteCheck("bad", dtype, len(raw(bad)))]

    with pytest.raises(UserError, match="tensor bad holds NaN or Inf"):
        FiniteCheck.feed(checks(), data)
    with pytest.raises(UserError, match="tensor bad holds NaN or Inf"):
        feed_in_chunks(checks(), data)
    path = tmp_path / "file"
    path.write_bytes(b"headpart" + data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(UserError, match="tensor bad holds NaN or Inf"):
            FiniteCheck.feed_file(checks(), descriptor, 8)
    finally:
        os.close(descriptor)


def test_integers_are_not_looked_at() -> None:
    FiniteCheck.feed([FiniteCheck("ids", "I64", 8)], b"\xff" * 8)
    assert_finite(torch.tensor([-1]), "ids")


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("place", [0, MANY // 2, MANY - 1])
def test_a_bad_value_of_a_tensor_is_found_in_little_memory(dtype: str, place: int) -> None:
    values = torch.randn(MANY).to(TYPES[dtype])
    assert all_finite(values)
    for bad in BAD:
        values[place] = bad
        with Largest() as made:
            assert not all_finite(values)
        assert 0 < made.nbytes < values.nbytes / 2
    with pytest.raises(UserError, match="BASE: tensor w holds NaN or Inf"):
        assert_finite(values, "w")
    assert all_finite(torch.empty(0, 3))


@pytest.mark.timeout(30)
def test_a_tensor_that_is_cut_off_while_it_is_looked_at_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    with open(tmp_path / "x", "rb") as file, pytest.raises(UserError, match="tensor w is cut off"):
        FiniteCheck.feed_file([FiniteCheck("w", "BF16", 200)], file.fileno(), 0)
