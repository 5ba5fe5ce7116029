"""What is written for a GPU, on the machine's CPU by a GPU's rules, where there is none: see `pretended_gpu`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    torch.version.cuda is not None or not shutil.which(os.environ.get("CXX", "c++")),
    reason="needs PyTorch's CPU build and a C++ compiler",
)


def _pytest(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.pretended_gpu",
        "-p",
        "no:cacheprovider",
        *map(str, args),
    ]
    clean = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(
        command, cwd=ROOT, env=clean | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=400
    )


@needs_compiler
@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "free", [str(80 * 2**30), pytest.param("0", marks=pytest.mark.thorough)], ids=["roomy", "full"]
)
def test_what_is_written_for_a_gpu_keeps_to_its_rules(free: str) -> None:
    """On a GPU with room, and on one where all that may lies in host memory."""
    done = _pytest(
        "-m",
        "gpu",
        "tests/lesa",
        "tests/analysis/test_weight_type.py",
        "tests/expansion/test_on_a_gpu.py",
        PRETENDED_GPU_FREE=free,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_compiler
@pytest.mark.timeout(420)
def test_what_a_gpu_refuses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_refused.py").write_text(
        """
import pytest, torch

def test_mixed():
    there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
    assert there.is_cuda and (there @ there).device.type == "cuda"
    assert torch.equal((there * 2).cpu(), here * 2)
    wrong_ones = lambda: there + here, lambda: there @ here, lambda: here.add_(there), lambda: torch.cat([there, here])
    for wrong in wrong_ones:
        with pytest.raises(RuntimeError, match="same device"):
            wrong()

def test_capture():
    total, graph, stream = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        total += 1
        doubled = total[1:] * 2
        with pytest.raises(RuntimeError, match="capturing"):
            float(total.sum())
    assert total.tolist() == [0, 0, 0]
    graph.replay()
    graph.replay()
    assert total.tolist() == [2, 2, 2] and doubled.tolist() == [4, 4]
"""
    )
    done = _pytest(tmp_path, "--rootdir", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
