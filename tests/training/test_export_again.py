"""An OUT that is there already: killed, unfinished, finished, somebody else's, or without room."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lesa_ray.checkpoint.reader import open_checkpoint
from lesa_ray.checkpoint.room import MARGIN
from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.training import export as export_module
from lesa_ray.training.export import Exported, OutFile, begin_export, export, is_exported, plan_export, write_file
from lesa_ray.training.trained_state import TrainedState
from tests import families
from tests.training.exporting import FACTS, assert_exported, changed, in_new_layers, run, save_state

KILLED = """
import os, signal, sys
from lesa_ray.training import export as module
from tests.training.exporting import run
write, files = module.write_file, []
def kill(plan, file):
    if len(files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    files.append(file)
    write(plan, file)
module.write_file = kill
run(*sys.argv[1:])
"""


def test_a_killed_export_goes_on(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base")
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, base, state, str(out)]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, timeout=360, check=False, cwd=root).returncode == -signal.SIGKILL
    kept = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    assert len(kept) == 2
    assert not (out / "config.json").exists()
    done = run(base, state, str(out))
    assert done.written == len(list(Path(base).glob("*.safetensors"))) - 2
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    run(base, state, str(tmp_path / "straight"))
    for file in out.glob("*.*"):
        assert file.read_bytes() == (tmp_path / "straight" / file.name).read_bytes(), file.name


def test_an_unfinished_export_of_another_state_is_made_anew(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base")
    out = str(tmp_path / "out")
    earlier = save_state(str(tmp_path / "earlier"), changed(base, in_new_layers))
    plan = plan_export(open_checkpoint(base), earlier, out)
    for file in begin_export(plan)[:3]:
        write_file(plan, file)
    later = {name: tensor + 1 for name, tensor in changed(base, in_new_layers).items()}
    done = run(base, save_state(str(tmp_path / "later"), later), out)
    assert done.written == len(plan.files)
    assert_exported(tmp_path / "out", base, later)


def test_an_export_of_another_base_or_configuration_is_another(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    other = families.make("llama_tied", tmp_path / "other", seed=1)
    config = tmp_path / "other/config.json"
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))

    def missing(base: str) -> list[OutFile]:
        plan = plan_export(open_checkpoint(base), state, str(tmp_path / "out"))
        found = begin_export(plan)
        for file in found:
            write_file(plan, file)
        return found

    assert missing(base)
    assert not missing(base)
    assert missing(other)
    assert not missing(other)
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert missing(other)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_state_that_differs_anywhere_it_is_looked_at_is_another(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of a local file 16 samples are, from its first to its last bytes; of an object all."""
    url = str(tmp_path / "state") if kind == "folder" else f"{request.getfixturevalue('s3')}/digests"
    save_state(url, {"w": torch.zeros(2**18)})
    storage = Storage(url)
    (file,) = [name for name in storage.list() if name.endswith(".distcp")]
    whole = storage.read(file)
    found = {TrainedState(url).digest()}
    assert {TrainedState(url).digest()} == found
    for at in (0, (len(whole) - 4096) * 8 // 15 + 9, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        storage.write(file, bytes(changed))
        found.add(TrainedState(url).digest())
    storage.write(file, whole)
    storage.write(".metadata", storage.read(".metadata") + b" ")
    found.add(TrainedState(url).digest())
    assert len(found) == 5


def test_an_unfinished_export_that_names_other_files_removes_none(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    record, mine = tmp_path / "out/training/export.json", tmp_path / "mine.safetensors"
    record.parent.mkdir(parents=True)
    others = [mine, tmp_path / "out/notes.txt", tmp_path / "out/training/best.safetensors"]
    for file in others:
        file.write_text("the user's")
    named = ["../mine.safetensors", str(mine), "notes.txt", "training/best.safetensors", 1]
    record.write_text(json.dumps({"identity": "another", "files": named}))
    run(base, save_state(str(tmp_path / "state"), changed(base, in_new_layers)), str(tmp_path / "out"))
    assert all(file.exists() for file in others)


def test_a_finished_export_is_done_once_and_mended(tmp_path: Path) -> None:
    base = families.make("llama", tmp_path / "base")
    trained = changed(base, in_new_layers)
    state, out = save_state(str(tmp_path / "state"), trained), tmp_path / "out"
    run(base, state, str(out))
    assert run(base, state, str(out)) == Exported(
        str(out), plan_export(open_checkpoint(base), state, str(out)).nbytes, 0, True
    )
    next(out.glob("model-00002*")).unlink()

    def fail(*args: object) -> None:
        raise MachineError("the disk is full")

    with pytest.raises(MachineError):
        export(plan_export(open_checkpoint(base), state, str(out)), FACTS, fail)
    assert not (out / "config.json").exists()
    cut = next(out.glob("model-00003*"))
    cut.write_bytes(cut.read_bytes()[:-1])
    assert run(base, state, str(out)).written == 2
    assert_exported(out, base, trained)


def test_what_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    other = families.make("llama_tied", tmp_path / "other", seed=1)
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))
    before = {file.name: file.read_bytes() for file in Path(other).iterdir()}
    with pytest.raises(UserError, match=r"^OUT .*other: holds a checkpoint; give a new place"):
        run(base, state, other)
    (tmp_path / "other/config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match="holds weights that are not its own"):
        run(base, state, other)
    (tmp_path / "config.json").rename(tmp_path / "other/config.json")
    assert {file.name: file.read_bytes() for file in Path(other).iterdir()} == before
    run(base, state, str(tmp_path / "out"))
    second = save_state(str(tmp_path / "second"), changed(base, lambda name: ".0." in name))
    with pytest.raises(UserError, match="holds an export of another training checkpoint"):
        run(base, second, str(tmp_path / "out"))


def test_an_export_by_another_version_is_named_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state, out = save_state(str(tmp_path / "state"), changed(base, in_new_layers)), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "__version__", "0.0.9")
        run(base, state, out)
    with pytest.raises(UserError, match=r"holds an export by lesa-ray 0\.0\.9, this is .*; give a new place"):
        run(base, state, out)


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"identity": "another"}'])
def test_weights_that_no_record_names_are_not_its_own(record: bytes, tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state, out = save_state(str(tmp_path / "state"), changed(base, in_new_layers)), Storage(str(tmp_path / "out"))
    out.write("training/export.json", record)
    for name in ("pytorch_model.bin", "model.safetensors"):
        out.write(name, b"the user's")
        with pytest.raises(UserError, match=rf"holds weights that are not its own \({name}\)"):
            run(base, state, out.url)
        assert out.read(name) == b"the user's"
        out.remove(name)
    run(base, state, out.url)


def test_it_is_done_when_config_json_is_there_and_nothing_half_written(tmp_path: Path) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state, out = save_state(str(tmp_path / "state"), changed(base, in_new_layers)), tmp_path / "out"
    run(base, state, str(out))
    plan = plan_export(open_checkpoint(base), state, str(out))
    assert is_exported(plan)
    config = (out / "config.json").read_bytes()
    (out / "config.json").unlink()
    (out / ".model.safetensors.0123abcd.tmp").write_bytes(b"of a process that was killed")
    assert not is_exported(plan)
    assert run(base, state, str(out)) == Exported(str(out), plan.nbytes, 0, False)
    assert (out / "config.json").read_bytes() == config
    assert not list(out.glob(".*.tmp"))


def test_room_is_wanted_for_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make("llama", tmp_path / "base")
    state, out = save_state(str(tmp_path / "state"), changed(base, in_new_layers)), tmp_path / "out"
    run(base, state, str(out))
    last = sorted(out.glob("model-*"))[-1]
    free = MARGIN + last.stat().st_size
    last.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free - 1))
    with pytest.raises(MachineError, match=r"the disk has"):
        run(base, state, str(out))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    assert run(base, state, str(out)).written == 1


def test_what_a_killed_one_left_half_written_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state, out = save_state(str(tmp_path / "state"), changed(base, in_new_layers)), tmp_path / "out"
    left = [out / ".model.safetensors.0123abcd.tmp", out / "training/.export.json.0123abcd.tmp"]
    (out / "training").mkdir(parents=True)
    for file in left:
        file.write_bytes(bytes(1000))
    room = MARGIN + plan_export(open_checkpoint(base), state, str(out)).nbytes

    def usage(path: object) -> object:
        return shutil._ntuple_diskusage(room, 0, room - sum(file.exists() for file in left))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert run(base, state, str(out)).written == 1
    assert not list(out.rglob("*.tmp"))


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make("llama_tied", tmp_path / "base")
    state = save_state(str(tmp_path / "state"), changed(base, in_new_layers))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MachineError, match=r"the disk has 0\.0 kB free"):
        run(base, state, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
