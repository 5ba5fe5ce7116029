"""The benchmark on a GPU, on a CPU at small shapes: what it counts of a peer that does not come to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.benchmark import gpu
from pipelines.benchmark.fresh import Run
from pipelines.benchmark.layers import Weights


@pytest.mark.timeout(360)
def test_each_part_is_measured_and_what_does_not_end_is_a_lower_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = [Weights(name, str(tmp_path), 6, d1 // 128, d2 // 128) for name, (d1, d2) in gpu.SHAPES.items()]
    for seed, unit in enumerate(units):
        unit.write(seed)
    whole = gpu.theirs(units[0], "cpu", 1, 100)
    assert whole.is_whole
    assert whole.steps == 10 * -(-(32 * 3) // 64)  # of four triples one is held out
    assert whole.step is not None
    assert whole.svd is not None
    assert whole.load is not None
    assert whole.whole == whole.steps * whole.step + whole.load + whole.svd
    cut = gpu.theirs(units[1], "cpu", 1, 0.0)
    assert not cut.is_whole
    assert cut.whole == 0.0
    run = Run(2.0, {"gram": 1.0, "train": 3.0}, 10**9, 0)
    figures = gpu.Figures(
        gram=gpu.gram_rates(units, "cpu", 128),
        ours={"network": {unit.name: run for unit in units}},
        notebook={"q": whole, "k": cut, "gate": gpu.Theirs(1.0, 100, 1.0, None, "too large"), "down": whole},
    )
    assert set(figures.gram) == {"chip", "q", "k", "gate", "down"}
    gpu.show(figures, units, "cpu")
    printed = capsys.readouterr().out
    assert "ours, network: 14.0 s for the seven types (gram 25%, train 75%)" in printed
    assert "notebook, 2 × k: svd not ended; " in printed
    assert "notebook, 2 × gate: svd refused (too large); 100 steps of 1000.00 ms; 101 s each" in printed
    total = 202 + 3 * whole.whole
    assert f"ratio, network: ≥ {total / 14:.1f}×" in printed
