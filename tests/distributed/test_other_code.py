"""A machine of the cluster that has no lesa_ray, or another one, is told of in a line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lesa_ray.distributed import rounds, tokenize
from lesa_ray.distributed.other_code import other_code
from lesa_ray.distributed.tasks import result_of
from lesa_ray.errors import UnsharedError
from lesa_ray.expansion.runner import Silent
from lesa_ray.training.data_settings import TokenizeConfig

LACKS = "No module named 'lesa_ray_of_another_machine'"


class Elsewhere:
    """What a worker cannot load."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("lesa_ray_of_another_machine",)


@pytest.mark.parametrize(
    ("end", "lack"),
    [
        ("ModuleNotFoundError: No module named 'lesa_ray'", "No module named 'lesa_ray'"),
        ("ModuleNotFoundError: No module named 'lesa_ray.lesa.split'", "No module named 'lesa_ray.lesa.split'"),
        (
            "ImportError: cannot import name 'folded' from 'lesa_ray.report.console' (/opt/lesa_ray/report/console.py)",
            "cannot import name 'folded' from 'lesa_ray.report.console'",
        ),
        (
            "AttributeError: Can't get attribute 'Bounds' on <module 'lesa_ray.distributed.evaluate' from '/opt/x.py'>",
            "Can't get attribute 'Bounds' on <module 'lesa_ray.distributed.evaluate'",
        ),
        ("AttributeError: module 'lesa_ray.sizes' has no attribute 'size'", "module 'lesa_ray.sizes' has no attribut"),
        ("ModuleNotFoundError: No module named 'flash_attn'", None),
        ("AttributeError: module 'torch' has no attribute 'lesa_ray'", None),
    ],
)
def test_what_another_machine_lacks_of_this_package(end: str, lack: str | None) -> None:
    found = other_code(RuntimeError(f"Traceback (most recent call last):\n  File x, line 1\n{end}\n"), "unit a")
    assert (found is None) == (lack is None)
    if found is not None and lack is not None:
        assert str(found).startswith(f"unit a: a machine of the cluster has not this lesa_ray ({lack}")
        assert "\n" not in str(found)


def test_a_task_ends_at_once(local_ray: None) -> None:
    """Its worker finds no module that an argument is of, which Ray tells by a traceback."""
    take = ray.remote(max_retries=0)(lambda value: value)
    with pytest.raises(UnsharedError, match=LACKS) as told:
        result_of(take.remote(Elsewhere()), "unit a")
    assert "Traceback" not in str(told.value)


def test_tokenising_ends_at_once(local_ray: None, tmp_path: Path) -> None:
    job = tokenize.Job(TokenizeConfig(data=("a",), tokenizer="b", out=str(tmp_path / "out")), "", 1, 1)
    folders: Any = Elsewhere()
    with pytest.raises(UnsharedError, match=LACKS):
        list(tokenize._run_all(job, lambda job, item: item, range(2), folders, print))


def test_training_ends_at_once(local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run: Any = SimpleNamespace(config=SimpleNamespace(out=str(tmp_path), retries=3), steps=1)
    resources: Any = SimpleNamespace(per_worker={"CPU": 1.0}, most=1)
    monkeypatch.setattr(rounds, "workers_now", lambda *_: 1)
    monkeypatch.setattr(rounds, "_round", lambda *_: RuntimeError(f"failed:\nModuleNotFoundError: {LACKS}\n"))
    with pytest.raises(UnsharedError, match=LACKS):
        rounds.train_in_rounds(run, resources, Silent())
