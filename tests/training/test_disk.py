"""Room on the disk is looked for before a run begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lesa_ray import MachineError
from lesa_ray.distributed import train
from lesa_ray.training.disk import check_disk, needed_bytes
from lesa_ray.training.run import Run, prepare
from lesa_ray.training.train_settings import TrainConfig
from tests.training.blocks import make_blocks

MARGIN = 64 * 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_blocks(str(tmp_path_factory.mktemp("data") / "blocks"))


@pytest.fixture
def config(bases: Callable[[str], str], data: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    def given(**more: Any) -> TrainConfig:
        settings = {
            "checkpoint": bases("llama"), "data": data, "out": str(tmp_path / "out"), "train": "all", "steps": 100,
            "batch": 4, "checkpoint_every": 10, "keep": 3,
        }  # fmt: skip
        return TrainConfig.model_validate({**settings, **more})

    return given


def a_disk_of(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def weights(run: Run) -> int:
    assert run.checkpoint is not None
    return sum(entry.elements for entry in run.checkpoint.tensors.values()) * 4  # the tiny base is in float32


@pytest.mark.parametrize(
    ("settings", "writing", "kept"),
    [
        ({}, 5, 4),  # three, the best, and the one under way
        ({"eval_rows": 0}, 4, 3),  # none is the best
        ({"checkpoint_every": 50}, 2, 2),
        ({"checkpoint_every": 51}, 2, 2),
        ({"checkpoint_every": 500}, 1, 1),
        ({"checkpoint_every": 500, "train": "norms"}, 1, 1),
        ({"keep": 1}, 3, 2),
    ],
)
def test_checkpoints_that_lie_there_at_once_and_the_result(
    config: Callable[..., TrainConfig], settings: dict[str, Any], writing: int, kept: int
) -> None:
    run = prepare(config(**settings), gpus=False)
    state = run.trained_parameters * (4 + 4 + 4)
    assert needed_bytes(run) == max(writing * state, kept * state + weights(run)) + MARGIN


def test_from_scratch_the_result_has_the_element_type_that_is_asked_for(
    config: Callable[..., TrainConfig], bases: Callable[[str], str]
) -> None:
    scratch = {"checkpoint": None, "architecture": bases("llama"), "train": (), "checkpoint_every": 500}
    for dtype, nbytes in ((None, 2), ("float32", 4)):
        run = prepare(config(**scratch, dtype=dtype), gpus=False)
        assert needed_bytes(run) == run.parameters * (12 + nbytes) + MARGIN


def test_a_disk_without_room_is_told_of_before_ray_starts(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = needed_bytes(prepare(config(), gpus=False))
    monkeypatch.setattr(train, "start_ray", lambda: pytest.fail("Ray was started"))
    a_disk_of(needed - 1, monkeypatch)
    with pytest.raises(MachineError, match=r"OUT .*out: needs .* for checkpoints of .* a smaller --keep takes less"):
        train.pretrain(config())
    a_disk_of(MARGIN, monkeypatch)
    for one in ({"checkpoint_every": 100}, {"keep": 1}):
        with pytest.raises(MachineError, match=r" free$"):
            train.pretrain(config(**one))
    assert not (tmp_path / "out").exists()
    a_disk_of(needed, monkeypatch)
    check_disk(prepare(config(), gpus=False))


def test_checkpoints_that_are_there_have_their_room(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that was left half written too: it is written anew, or removed."""
    run = prepare(config(), gpus=False)
    folder = tmp_path / "out" / "training" / "checkpoints"
    for name in ("step-00000010", "step-00000020", "mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__0_0.distcp").write_bytes(bytes(1000))
    a_disk_of(needed_bytes(run) - 2000, monkeypatch)
    check_disk(run)
    a_disk_of(needed_bytes(run) - 2001, monkeypatch)
    with pytest.raises(MachineError):
        check_disk(run)
