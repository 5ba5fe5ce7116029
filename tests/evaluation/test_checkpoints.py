"""Copies of checkpoints behind URLs: where they lie, and that none stays behind."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError
from lesa_ray.evaluation import checkpoints
from lesa_ray.evaluation.checkpoints import local_folder
from lesa_ray.scratch import held_folder
from tests.evaluation import tiny


def hold(told: Any) -> None:
    """A copy that takes for ever."""
    with held_folder(checkpoints._COPIES) as folder:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        told.send(folder)
        time.sleep(100)


@pytest.mark.timeout(360)
def test_the_copy_of_a_killed_process_is_removed_before_the_next(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("LESA_RAY_SCRATCH", str(scratch))
    Storage(s3).fs.put(tiny.checkpoint(tmp_path / "one"), "bucket/killed", recursive=True)
    forked = multiprocessing.get_context("fork")  # importing transformers takes seconds
    hears, tells = forked.Pipe()
    other = forked.Process(target=hold, args=(tells,))
    other.start()
    try:
        theirs = Path(hears.recv())
        with local_folder("one", f"{s3}/killed") as (folder, _):
            assert Path(folder).parent == theirs.parent == scratch
            assert (Path(folder) / "model.safetensors").stat().st_size > 4
        assert list(scratch.iterdir()) == [theirs]  # ours has gone, and theirs is in use
    finally:
        other.kill()
        other.join()
    assert theirs.exists()
    with local_folder("one", f"{s3}/killed") as (folder, _):
        assert [str(one) for one in scratch.iterdir()] == [folder]
    assert list(scratch.iterdir()) == []


def test_a_copy_without_room_is_refused(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESA_RAY_SCRATCH", str(tmp_path / "scratch"))
    Storage(s3).fs.put(tiny.checkpoint(tmp_path / "one"), "bucket/large", recursive=True)
    monkeypatch.setattr(checkpoints.Storage, "free_bytes", lambda storage: 1000)
    with pytest.raises(MachineError, match="set LESA_RAY_SCRATCH to a folder"), local_folder("one", f"{s3}/large"):
        pass
    assert list((tmp_path / "scratch").iterdir()) == []
