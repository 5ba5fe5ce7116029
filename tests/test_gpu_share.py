"""The share of a GPU that a task was given is all it reckons with; a GPU that is full is a fault in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lesa_ray import ExpandConfig, MachineError, expand
from lesa_ray.distributed import analyze
from lesa_ray.expansion.methods.lesa import Lesa
from lesa_ray.expansion.runner import InlineRunner
from lesa_ray.gpu import CONTEXT_BYTES, fits_device, full_gpu_is_a_fault, limit_device

GB = 10**9


def test_free_is_what_is_left_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a GPU of 8 GB in place of a GPU."""

    def gpu(free: int, fraction: float, reserved: int) -> None:
        for name, value in (
            ("empty_cache", None),
            ("mem_get_info", (free, 8 * GB)),
            ("get_per_process_memory_fraction", fraction),
            ("memory_reserved", reserved),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    gpu(free=7 * GB, fraction=1.0, reserved=0)
    assert fits_device(int(5.9 * GB), "cuda")
    assert not fits_device(6 * GB, "cuda")
    gpu(free=7 * GB, fraction=0.25, reserved=GB)  # 2 GB, of which one is taken, whatever the others have left
    assert fits_device(int(0.84 * GB), "cuda")
    assert not fits_device(int(0.86 * GB), "cuda")
    gpu(free=GB // 2, fraction=0.25, reserved=0)
    assert not fits_device(GB // 2, "cuda")


def test_contexts_and_shares_together_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 16 * GB
    shares: list[float] = []

    class Properties:
        total_memory = total

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    for share in (0.25, 1.0, 2.0):
        limit_device(share)
    assert len(shares) == 1, "a whole GPU needs no limit"
    assert 4 * (shares[0] * total + CONTEXT_BYTES) == pytest.approx(total)


TF32 = """
import os, sys, torch
from lesa_ray import ExpandConfig, expand
from lesa_ray.expansion.methods.lesa import Lesa
from lesa_ray.expansion.runner import InlineRunner
assert torch.get_float32_matmul_precision() == "high", "as in NVIDIA's containers"
Lesa.run = lambda *_: print(torch.get_float32_matmul_precision(), flush=True) or os._exit(0)
expand(ExpandConfig(base=sys.argv[1], out=sys.argv[2], method="lesa"), runner=InlineRunner())
"""


def test_units_multiply_in_float32_whatever_the_container_says(bases: Callable[[str], str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TF32, bases("llama"), str(tmp_path / "out")],
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        stdout=subprocess.PIPE, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == "highest"


def test_the_pieces_of_an_analysis_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    work: Any = SimpleNamespace(subject=SimpleNamespace(types=("q",)))
    monkeypatch.setattr(analyze, "work_on_type", lambda *_: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        analyze._Work.do(work, "q", "cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@pytest.mark.gpu
def test_a_real_gpu_keeps_to_the_share() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        limit_device(0.25)
        assert not fits_device(total // 4, "cuda")
        assert fits_device(total // 8, "cuda")
        torch.empty(total // 8, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(total // 3, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_a_fault_of_the_machine(
    error: Exception, bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(Lesa, "run", run)
    config = ExpandConfig(base=bases("llama"), out=str(tmp_path / "out"), method="lesa")
    with pytest.raises(
        MachineError,
        match=r"unit \S+: the GPU's memory is full; give it more of a GPU if there is more .--gpus-per-task.,",
    ):
        expand(config, runner=InlineRunner())


def test_other_faults_of_a_gpu_are_not_taken_for_a_full_one() -> None:
    said = "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevd(handle)`"
    with pytest.raises(RuntimeError, match="Xsyevd") as caught, full_gpu_is_a_fault("unit", "--gpus-per-task 0"):
        raise RuntimeError(said)
    assert not isinstance(caught.value, MachineError)
