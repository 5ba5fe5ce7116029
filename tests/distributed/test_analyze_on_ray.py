"""An analysis as Ray tasks gives what it gives in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from lesa_ray import UserError
from lesa_ray.analysis.settings import AnalyzeConfig
from lesa_ray.distributed import cluster, tasks
from lesa_ray.distributed.analyze import analyze
from lesa_ray.expansion.runner import Silent
from tests.evaluation import tiny
from tests.waiting import until


def test_the_same_figures(local_ray: None, tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=2)
    (tmp_path / "some.txt").write_text("To be, or not to be.")
    config = AnalyzeConfig(base=base, data=(str(tmp_path / "some.txt"),), fit=False, match=False, cpus_per_task=4)
    here, there = (analyze(config, use_ray=use_ray) for use_ray in (False, True))
    assert there["types"].keys() == here["types"].keys()
    assert there["residual"]["layers"] == [pytest.approx(layer, rel=1e-4) for layer in here["residual"]["layers"]]
    for name, found in here["types"].items():
        assert there["types"][name]["norms"] == pytest.approx(found["norms"], rel=1e-5)
        assert there["types"][name]["effective_rank"] == pytest.approx(found["effective_rank"], rel=1e-4)


@pytest.mark.timeout(300)
def test_that_it_waits_for_room_is_told(local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(tasks, "CROWDED_SECONDS", 1.0)
    base = tiny.checkpoint(tmp_path / "base", num_hidden_layers=4)

    class Busy:
        pass

    others = ray.remote(num_cpus=4)(Busy).remote()
    until(lambda: not cluster.free().most("CPU"))
    seen: list[tuple[float, str]] = []

    class Watching(Silent):
        def progress(self, done: float, detail: str) -> None:
            seen.append((done, detail))
            if detail.startswith("waiting"):
                ray.kill(others)

    analyze(AnalyzeConfig(base=base, fit=False, match=False, cpus_per_task=4), Watching(), use_ray=True)
    first = next(detail for _, detail in seen if detail)
    assert first == "waiting for room: others use the cluster's machines"
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_gpu_that_is_not_there(local_ray: None, bases: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match="no GPU in this Ray cluster"):
        analyze(AnalyzeConfig(base=bases("llama"), device="cuda"), use_ray=True)
