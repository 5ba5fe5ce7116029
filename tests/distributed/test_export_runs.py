"""Exports of checkpoints of a run: one at a time at an OUT, which holds nothing of theirs but the result."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lesa_ray.distributed.export import export_checkpoint
from lesa_ray.distributed.tenancy import tenancy
from lesa_ray.errors import MachineError, UserError
from lesa_ray.expansion.runner import Silent
from lesa_ray.training import export as export_module
from lesa_ray.training.run import LEASE_DIR
from tests import families
from tests.training.blocks import make_blocks
from tests.training.workers import run_all, run_workers

Bases = Callable[[str], str]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def run(bases: Bases, tmp_path: Path) -> str:
    """The folder of a run with checkpoints of steps 1 and 2, not exported."""
    out, data = str(tmp_path / "run"), make_blocks(str(tmp_path / "blocks"), rows=16)
    settings = {"steps": 2, "batch": 2, "train": "all", "checkpoint_every": 1}
    run_workers(run_all, 1, {"checkpoint": bases("llama"), "data": data, "out": out, **settings})
    return out


class Meanwhile(Silent):
    """Does something when the export has begun."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def phase(self, name: str, total: int) -> None:
        self._action()


def test_of_two_the_second_is_told_of_the_first(run: str, tmp_path: Path) -> None:
    """Their files have the same names: with `config.json` of one they were a checkpoint of both steps."""
    alone, out = str(tmp_path / "alone"), str(tmp_path / "out")
    export_checkpoint(run, alone, "1")

    def second() -> None:
        with pytest.raises(MachineError, match=rf"^OUT {out}: process {os.getpid()} on .* is at work on it; wait"):
            export_checkpoint(run, out, "2")

    export_checkpoint(run, out, "1", listener=Meanwhile(second))
    assert os.listdir(Path(out) / "training") == ["export.json"]
    expected, found = families.tensors(alone), families.tensors(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert export_checkpoint(run, out, "1").reused
    with pytest.raises(UserError, match=rf"^OUT {out}: holds an export of another training checkpoint"):
        export_checkpoint(run, out, "2")
    assert os.listdir(Path(out) / "training") == ["export.json"]


def test_the_lease_of_who_was_killed_at_the_end_goes(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(run, str(out), "1")
    with tenancy(str(out), LEASE_DIR, Silent()):
        assert export_checkpoint(run, str(out), "1").reused
    assert os.listdir(out / "training") == ["export.json"]
    assert not export_checkpoint(run, run, "1").reused
    with tenancy(run, LEASE_DIR, Silent()):
        assert export_checkpoint(run, run, "1").reused
        assert (Path(run) / LEASE_DIR).exists()  # of who trains there


def test_a_disk_that_is_full_is_told_with_what_to_do(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_file", full)
        with pytest.raises(MachineError, match=rf"^OUT {out}: no space left .*shard\); the same command goes on from"):
            export_checkpoint(run, out, "1")
    assert not export_checkpoint(run, out, "1").reused


def test_a_run_that_is_at_work_is_left_alone(run: str) -> None:
    with tenancy(run, LEASE_DIR, Silent()), pytest.raises(MachineError, match="is at work on it"):
        export_checkpoint(run, run, "1")
    assert not (Path(run) / "training/export.json").exists()
    assert not (Path(run) / "config.json").exists()


def test_a_place_of_something_else_stays_as_it_is(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"^OUT {out}: holds a checkpoint; give a new place"):
        export_checkpoint(run, str(out), "last")
    assert os.listdir(out) == ["config.json"]


def test_what_is_found_wrong_meanwhile_leaves_nothing_of_ours(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"holds weights that are not its own \(foreign\.bin\)"):
        export_checkpoint(run, str(out), "last", listener=Meanwhile((out / "foreign.bin").touch))
    assert os.listdir(out) == ["foreign.bin"]
