"""OUT: how much room it is asked to have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lesa_ray import ExpandConfig, MachineError
from lesa_ray.expansion.out import check_room
from lesa_ray.expansion.prepare import prepare

MARGIN = 64 * 2**20


def test_room_is_needed_for_what_is_missing_and_nothing_else(
    bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    expansion = prepare(ExpandConfig(base=bases("llama"), out=str(out), method="avg-deus"))

    def is_just_enough(nbytes: int) -> bool:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes))
        check_room(expansion)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes - 1))
        with pytest.raises(MachineError, match=r"needs .* GB, the disk has .* GB free"):
            check_room(expansion)
        return True

    unit, shard = expansion.units[0], expansion.shards[0]
    made = expansion.left_by([unit])
    assert 0 < made < expansion.scratch_bytes
    needed = expansion.nbytes + expansion.scratch_bytes + MARGIN
    assert is_just_enough(needed)
    (out / ".lesa-ray" / "units").mkdir(parents=True)
    (out / ".lesa-ray" / "units" / unit.file).touch()
    assert is_just_enough(needed - made)
    (out / shard.file).write_bytes(bytes(shard.nbytes - 1))  # as a file system may leave it: written again
    assert is_just_enough(needed - made)
    (out / shard.file).write_bytes(bytes(shard.nbytes))
    assert is_just_enough(needed - made - shard.nbytes)
