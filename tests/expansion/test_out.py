"""OUT: how much room it is asked to have, and that it holds one base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lesa_ray import ExpandConfig, MachineError, UserError, expand
from lesa_ray.checkpoint.shards import Shard
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.expansion.layout import Expansion
from lesa_ray.expansion.out import check_out, check_room
from lesa_ray.expansion.prepare import prepare
from lesa_ray.expansion.runner import InlineRunner, Listener

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
        with pytest.raises(MachineError, match=r"needs .* [GM]B, the disk has .* [GMk]B free"):
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


def test_nothing_half_written_lies_in_what_is_done(
    bases: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed when it has just become that leaves its folder of work alone, which the next removes."""
    out = tmp_path / "out"
    config = ExpandConfig(base=bases("llama"), out=str(out), method="llama-pro")

    class Meanwhile(InlineRunner):
        def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
            super().write_shards(expansion, shards, listener)
            (out / ".model.safetensors.0123abcd.tmp").write_bytes(b"of a worker that was killed")

    remove = Storage.remove_tree

    def killed(storage: Storage, name: str = "") -> None:
        if (out / "config.json").exists():
            raise KeyboardInterrupt
        remove(storage, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            expand(config, runner=Meanwhile())
    assert (out / ".lesa-ray").exists()
    assert expand(config).reused
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("change", ["other weights", "touched", "shorter", "longer", "gone"])
def test_weights_that_change_during_the_run_leave_no_mixture(
    change: str, bases: Callable[[str], str], tmp_path: Path
) -> None:
    """As where a training run writes its newest checkpoint to the same folder."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(bases("llama"), base)

    class Meanwhile(InlineRunner):
        def write_shards(self, expansion: Expansion, shards: list[Shard], listener: Listener) -> None:
            super().write_shards(expansion, shards, listener)
            file = base / expansion.checkpoint.shards[0]
            if change == "gone":
                file.unlink()
            else:
                bytes_now = file.read_bytes()
                changed = {
                    "other weights": bytes_now[:-2000] + bytes(2000), "touched": bytes_now, "shorter": bytes_now[:-8],
                    "longer": bytes_now + bytes(8),
                }  # fmt: skip
                file.write_bytes(changed[change])

    config = ExpandConfig(base=str(base), out=str(out), method="llama-pro")
    if change == "touched":
        assert expand(config, runner=Meanwhile()).layers
        return
    if change == "gone":  # perhaps a disk that is mounted again
        with pytest.raises(MachineError, match=r"checkpoint .*base: model\S+ was there and is not any more; the same"):
            expand(config, runner=Meanwhile())
        assert out.exists()
        return
    with pytest.raises(UserError, match=r"checkpoint .*base: its weights changed during the run"):
        expand(config, runner=Meanwhile())
    assert not out.exists()


def test_a_link_may_lead_to_a_folder_but_not_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("disk")
    with pytest.raises(UserError, match=r"^OUT .*link: is a link to disk, which is not there; make that folder$"):
        check_out("base", str(link))
    (tmp_path / "disk").mkdir()
    check_out("base", str(link))
